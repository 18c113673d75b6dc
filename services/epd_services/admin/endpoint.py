"""Where the admin API of a running gateway is and which token opens it: written by the gateway,
found by the command line.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from epd.errors import ConfigError

__all__ = ["Endpoint", "announce", "find", "make_token", "read_token"]

_FILE = "admin.json"
_TOKEN = "admin.token"
_SHORTEST, _LONGEST = 16, 512


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One gateway's admin API. `pid` is the gateway's, to tell a file that outlived it."""

    url: str
    token_file: str
    pid: int


def read_token(path: Path) -> str:
    """The token in a file. Raises `ConfigError` when it cannot be one."""
    try:
        token = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            "Cannot read the admin token.\n"
            f"The file {path} is missing, or not readable by this user.\n"
            "Name the gateway's token file with --token-file or EPD_ADMIN_TOKEN_FILE."
        ) from None
    if not _SHORTEST <= len(token) <= _LONGEST or not token.isascii() or not token.isprintable():
        raise ConfigError(
            "The admin token cannot be used.\n"
            f"The file {path} must hold one line of {_SHORTEST} to {_LONGEST} printable characters."
            "\nopenssl rand -hex 32 writes a good one."
        )
    return token


def make_token(directory: Path) -> Path:
    """The token file of a run directory, made if it is not there; only its owner can read it."""
    path = directory / _TOKEN
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        if not _is_private(path):
            raise ConfigError(
                f"Cannot trust {path}.\nAnother user owns it or may read it.\nDelete it."
            ) from None
        return path
    with os.fdopen(file, "w") as out:
        out.write(secrets.token_urlsafe(32) + "\n")
    return path


def announce(directory: Path, endpoint: Endpoint) -> Path:
    """The file that tells `find` about a gateway, written at once or not at all."""
    path = directory / _FILE
    draft = path.with_suffix(f".{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        json.dump(asdict(endpoint), out)
    draft.replace(path)
    return path


def find(run_dir: Path | None = None) -> Endpoint:
    """The gateway of a run directory, or the only one that this user runs on this machine.

    Raises `ConfigError` when there is none, or more than one to choose from.
    """
    if run_dir is not None:
        if found := _read(run_dir / _FILE):
            return found
        raise ConfigError(
            f"No gateway runs in {run_dir}.\nIt has no {_FILE} of a live process.\nepd serve"
        )
    files = sorted(Path(tempfile.gettempdir()).glob(f"epd-*/{_FILE}"))
    alive = {path.parent: endpoint for path in files if (endpoint := _read(path))}
    if len(alive) == 1:
        return next(iter(alive.values()))
    if not alive:
        raise ConfigError(
            "No gateway was found.\nNone that this user started is running on this machine, or it "
            "has a run directory of its own.\nepd admin --run-dir DIRECTORY status"
        )
    raise ConfigError(
        f"{len(alive)} gateways run here.\nTheir run directories: "
        f"{', '.join(map(str, alive))}.\nepd admin --run-dir {next(iter(alive))} status"
    )


def _read(path: Path) -> Endpoint | None:
    """What the file says if it is ours and its gateway lives."""
    try:
        if not _is_private(path):
            return None
        endpoint = Endpoint(**json.loads(path.read_text()))
        os.kill(endpoint.pid, 0)
    except (OSError, ValueError, TypeError):
        return None
    return endpoint


def _is_private(path: Path) -> bool:
    info = path.lstat()
    return info.st_uid == os.geteuid() and not stat.S_IMODE(info.st_mode) & 0o077
