"""Finding and reading the files of a checkpoint, without torch and without trusting them.

A safetensors file is an 8-byte little-endian length n, a JSON header of n bytes that names every
tensor with dtype, shape and byte range, and the bytes. Only headers are parsed here.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epd.errors import CheckpointError

__all__ = [
    "TensorEntry",
    "problem",
    "read_header",
    "read_json",
    "resolve_directory",
    "weight_entries",
]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_JSON = 64 << 20
_MAX_HEADER = 100_000_000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
          "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}  # fmt: skip


def problem(what: str, why: str, hint: str) -> CheckpointError:
    """A three-line error: what failed, why, and what to do next."""
    return CheckpointError(f"{what}\n{why}\n{hint}")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes `start` to `end` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def resolve_directory(name: str | Path) -> Path:
    """The local directory of a path or a hub id; a hub id is downloaded when it is not cached."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    text = str(name)
    if path.exists() or not _HUB_ID.fullmatch(text):
        raise problem(
            f"Cannot load the model {text[:200]!r}.",
            "It is neither a directory nor a hub id of the form owner/name.",
            "Pass the directory that holds config.json and the safetensors files.",
        )
    return _download(text)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "*.safetensors"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted, etag_timeout=5))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise problem(
            f"Cannot load the model {hub_id!r}.",
            f"No such directory, and the hub did not give it ({type(error).__name__}).",
            "Check the name and the network, or pass the path of a downloaded checkpoint.",
        ) from None


def read_json(directory: Path, name: str, *, required: bool = False) -> dict[str, Any]:
    """The object in `directory/name`; empty when an optional file is absent."""
    path = directory / name
    if not path.is_file():
        if not required:
            return {}
        raise problem(
            f"Cannot load the model in {directory}.",
            f"It has no {name}.",
            "Pass a complete Hugging Face checkpoint directory.",
        )
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError("too large")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        raise _damaged(path, "It is not readable JSON.") from None
    if not isinstance(value, dict):
        raise _damaged(path, "It does not hold a JSON object.")
    return value


def weight_entries(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint by name; only headers of safetensors files are read."""
    if (directory / _INDEX).is_file():
        return _sharded(directory)
    if (directory / _SINGLE).is_file():
        return read_header(directory / _SINGLE)
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLED)
    if pickled:
        raise problem(
            f"Refusing to open {pickled[0]} in {directory}.",
            "It is a Python pickle, which can run code when loaded; only safetensors are read.",
            "Convert it where you trust it: load it with transformers, then save_pretrained(DIR).",
        )
    raise problem(
        f"Cannot load the model in {directory}.",
        f"It holds neither {_SINGLE} nor {_INDEX}.",
        "Pass a directory that holds safetensors weights.",
    )


def _sharded(directory: Path) -> dict[str, TensorEntry]:
    index = directory / _INDEX
    weight_map = read_json(directory, _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(index, "It has no weight_map.")
    headers: dict[str, dict[str, TensorEntry]] = {}
    for file in weight_map.values():
        if not isinstance(file, str) or not _plain_name(file):
            raise problem(
                f"Refusing the weight index {index}.",
                "It points to a file that is not a safetensors file beside it.",
                "Use a checkpoint whose index names only files in its own directory.",
            )
        if file not in headers:
            headers[file] = read_header(directory / file)
    missing = [name for name, file in weight_map.items() if name not in headers[file]]
    if missing:
        raise _damaged(index, f"Tensor {missing[0][:200]} is not in the file it names.")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _plain_name(file: str) -> bool:
    return file.endswith(".safetensors") and not set(file) & set("/\\:\0") and file[0] != "."


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file. Raises `CheckpointError` when it is cut or malformed."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise _damaged(path, "The file is shorter than its header says.")
            header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        raise _damaged(path, "Its header is not JSON.") from None
    except OSError as error:
        raise _damaged(path, f"It cannot be read ({type(error).__name__}).") from None
    if not isinstance(header, dict):
        raise _damaged(path, "Its header is not a JSON object.")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, item, 8 + length, size) for name, item in header.items()}


def _entry(path: Path, name: str, item: Any, base: int, size: int) -> TensorEntry:
    try:
        dtype, shape = item["dtype"], tuple(item["shape"])
        start, end = item["data_offsets"]
        numbers = (*shape, start, end)
        sound = all(type(n) is int and n >= 0 for n in numbers)
        sound = sound and end - start == math.prod(shape) * _BYTES[dtype]
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise _damaged(path, f"Tensor {name[:200]} has a malformed entry.")
    if base + end > size:
        raise _damaged(path, f"The file ends inside tensor {name[:200]}.")
    return TensorEntry(path, dtype, shape, base + start, base + end)


def _damaged(path: Path, why: str) -> CheckpointError:
    return problem(f"Cannot read {path}.", why, "Download or copy the checkpoint again.")
