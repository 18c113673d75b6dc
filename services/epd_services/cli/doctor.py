"""`epd doctor`: looks at everything a pipeline needs and says what to do about what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from epd.cache.server import find_server
from epd.demo import BUILT_IN_NAME, CHECKPOINT
from epd.errors import EPDError
from epd.models.card import ModelCard
from epd.roles import parse_topology
from epd_services.cli.terminal import print_json, show_table, table
from epd_services.progress import progress
from epd_services.settings import Settings, load_settings, unknown_variables
from epd_services.stack import port_problem

__all__ = ["Check", "doctor", "run_checks"]

GiB = 1 << 30
_LOAD_LIMIT = GiB


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: `state` is ok, warn or fail; `advice` says what to do unless it is ok."""

    name: str
    state: str
    found: str
    advice: str = ""


def doctor(config: Path | None, *, as_json: bool) -> int:
    """Print every check; the exit code: 1 if one failed."""
    checks = run_checks(config)
    failed = any(check.state == "fail" for check in checks)
    if as_json:
        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        rows = [(check.state, check.name, check.found, check.advice) for check in checks]
        show_table(table("", ("", "check", "found", "what to do"), rows))
    return int(failed)


def run_checks(config: Path | None = None) -> list[Check]:
    """Every check in turn; one that raises has failed."""
    try:
        settings, origin = load_settings(config)
        parse_topology(settings.topology)
    except EPDError as error:
        return [_packages(), Check("settings", "fail", str(error), "epd config show")]
    changed = sorted(name for name, source in origin.items() if source != "default")
    checks = [_packages(), Check("settings", "ok", ", ".join(changed) or "all at their defaults")]
    checks += [Check("settings", "warn", line, "epd config show") for line in unknown_variables()]
    with progress("checking", len(_CHECKS)) as advance:
        for done, (name, check) in enumerate(_CHECKS):
            advance(done, name)
            checks += _guarded(name, check, settings)
        advance(len(_CHECKS), "done")
    return checks


def _guarded(
    name: str, check: Callable[[Settings], Iterator[Check]], settings: Settings
) -> list[Check]:
    try:
        return list(check(settings))
    except EPDError as error:
        lines = str(error).splitlines()
        return [Check(name, "fail", " ".join(lines[:2]), lines[2] if len(lines) > 2 else "")]
    except Exception as error:
        return [Check(name, "fail", f"{type(error).__name__}: {error}"[:300], "make setup")]


def _packages() -> Check:
    names = ("epd", "torch", "triton", "transformers", "pyzmq", "redis", "fastapi", "msgspec")
    found = [f"Python {platform.python_version()}", *(f"{n} {_version(n)}" for n in names)]
    absent = [name for name in names if _version(name) == "absent" and name != "triton"]
    if sys.version_info < (3, 11) or absent:
        return Check("versions", "fail", ", ".join(found), "make setup")
    return Check("versions", "ok", ", ".join(found))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _device(settings: Settings) -> Iterator[Check]:
    import torch

    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        name = f"{facts.name}, {facts.total_memory / GiB:.0f} GiB, CUDA {torch.version.cuda}"
        weak = facts.major < 8
        advice = "kernels are tested from compute capability 8.0 on" if weak else ""
        yield Check("GPU", "warn" if weak else "ok", name, advice)
        if _version("triton") == "absent":
            yield Check("triton", "warn", "absent", "pip install 'epd[gpu]'")
    elif settings.device.startswith("cuda"):
        yield Check(
            "GPU", "fail", f"none, but device is {settings.device}", "epd serve --device cpu"
        )
    else:
        yield Check(
            "GPU", "warn", f"none; {cores} CPU cores", "small models run; larger ones crawl"
        )


def _memory(settings: Settings) -> Iterator[Check]:
    facts = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    free = int(facts["MemAvailable"].split()[0]) * 1024
    card = _card(settings)
    workers = len(parse_topology(settings.topology))
    weights = sum(entry.end - entry.start for entry in card.entries.values())
    # each worker: Python with torch, its part of the weights, its KV cache
    need = workers * (GiB // 2 + settings.kv_memory_bytes) + 2 * weights + settings.cache_bytes
    text = f"{free / GiB:.1f} GiB free, about {need / GiB:.1f} GiB needed"
    short = free < need
    advice = "EPD_KV_MEMORY_BYTES, or fewer workers: --topology 1EPD" if short else ""
    yield Check("memory", "warn" if short else "ok", text, advice)


def _cache(settings: Settings) -> Iterator[Check]:
    server = find_server()
    if settings.cache_url is not None:
        yield Check("token cache", "ok", "a server is named in the settings; serve asks it")
    elif server is None:
        advice = "apt-get install redis-server; without it each process caches alone"
        yield Check("token cache", "warn", "no redis-server or valkey-server on PATH", advice)
    else:
        yield Check("token cache", "ok", f"{server}, started privately by serve")


def _ports(settings: Settings) -> Iterator[Check]:
    where = f"{settings.host}:{settings.port}"
    if why := port_problem(settings.host, settings.port):
        yield Check("port", "warn", f"{where}: {why}", "epd serve --port ANOTHER")
    else:
        yield Check("port", "ok", f"{where} is free")


def _sockets(settings: Settings) -> Iterator[Check]:
    """Private directories and unix sockets are what workers talk through."""
    parent = settings.run_dir or Path(tempfile.gettempdir())
    if settings.run_dir is not None and settings.run_dir.is_dir():
        mode = stat.S_IMODE(settings.run_dir.stat().st_mode)
        if mode & 0o077:
            yield Check(
                "run directory", "warn", f"{parent} has mode {mode:o}", f"chmod 700 {parent}"
            )
    nearest = next(path for path in (parent, *parent.absolute().parents) if path.is_dir())
    directory = Path(tempfile.mkdtemp(prefix="epd-", dir=nearest))
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(directory / "probe.sock"))
    finally:
        shutil.rmtree(directory)
    free = shutil.disk_usage(nearest).free
    if free < GiB // 4:
        yield Check("ipc sockets", "warn", f"{nearest} has {free / GiB:.2f} GiB left", "make room")
    else:
        yield Check("ipc sockets", "ok", f"private sockets work in {nearest}")


def _card(settings: Settings) -> ModelCard:
    name = None if settings.model else BUILT_IN_NAME
    return ModelCard.load(settings.model or CHECKPOINT, name=name)


def _model(settings: Settings) -> Iterator[Check]:
    card = _card(settings)
    weights = sum(entry.end - entry.start for entry in card.entries.values())
    text = f"{card.name}: {card.model_type}, {weights / 1e6:.0f} MB, revision {card.revision[:12]}"
    if weights > _LOAD_LIMIT:
        yield Check("model", "ok", f"{text}; its files are whole, the weights were not loaded")
        return
    from epd import LLM, SamplingParams

    answer = LLM(settings.model).chat("Hello", sampling=SamplingParams(max_tokens=1))
    yield Check("model", "ok", f"{text}; loads and answers in {answer.timeline.elapsed:.2f} s")


_CHECKS: tuple[tuple[str, Callable[[Settings], Iterator[Check]]], ...] = (
    ("device", _device),
    ("memory", _memory),
    ("token cache", _cache),
    ("port", _ports),
    ("ipc sockets", _sockets),
    ("model", _model),
)
