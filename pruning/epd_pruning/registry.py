"""Methods by name. Importing this loads no torch; asking for a method loads that method only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from importlib import import_module
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from epd_pruning.errors import PruningError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from epd_pruning.base import TokenPruner
    from epd_pruning.layer_base import LayerPruner
    from epd_pruning.schedule import Schedule

__all__ = ["available", "fingerprint", "layer_pruner", "token_pruner"]

# raise when a method's answers change although its hyper-parameters do not
REVISION = 1

_TOKEN_PRUNERS = {
    "cdpruner": "epd_pruning.cdpruner:CDPruner",
    "dart": "epd_pruning.dart:Dart",
    "divprune": "epd_pruning.divprune:DivPrune",
    "dpp": "epd_pruning.cdpruner:Diverse",
    "low_resolution": "epd_pruning.controls:LowResolution",
    "random": "epd_pruning.controls:Random",
    "relevance": "epd_pruning.relevance:RelevanceOnly",
    "script": "epd_pruning.script:Script",
    "uniform_stride": "epd_pruning.controls:UniformStride",
    "visionzip": "epd_pruning.visionzip:VisionZip",
    "vispruner": "epd_pruning.vispruner:VisPruner",
}
_LAYER_PRUNERS = {
    "adaptinfer": "epd_pruning.adaptinfer:AdaptInfer",
    "dart_layer": "epd_pruning.layer_rivals:DartLayer",
    "fastv": "epd_pruning.layer_rivals:FastV",
    "pyramiddrop": "epd_pruning.layer_rivals:PyramidDrop",
    "sparsevlm": "epd_pruning.sparsevlm:SparseVLM",
}


def available(kind: Literal["token", "layer"] = "token") -> tuple[str, ...]:
    """Names of the methods that run before the LLM ("token") or inside it ("layer"), sorted."""
    return tuple(sorted(_TOKEN_PRUNERS if kind == "token" else _LAYER_PRUNERS))


def token_pruner(name: str, params: Mapping[str, Any] | None = None) -> TokenPruner:
    """The method `name` with `params` over its defaults; bad ones are a `PruningError`."""
    cls = _load(_TOKEN_PRUNERS, name)
    pruner: TokenPruner = cls(**_checked(cls, params or {}))
    return pruner


def layer_pruner(
    name: str, schedule: Schedule | str, *, params: Mapping[str, Any] | None = None
) -> LayerPruner:
    """The method `name` on `schedule`, or on its published preset of that name."""
    cls = _load(_LAYER_PRUNERS, name)
    if isinstance(schedule, str):
        if schedule not in cls.presets:
            raise PruningError("schedule", f"one of {', '.join(cls.presets)}", schedule)
        schedule = cls.presets[schedule]
    pruner: LayerPruner = cls(schedule=schedule, **_checked(cls, params or {}))
    return pruner


def fingerprint(pruner: TokenPruner | LayerPruner) -> str:
    """SHA-256 (hex) of name, revision and every hyper-parameter: a part of cache keys."""
    told = {"method": pruner.name, "revision": REVISION, "params": asdict(pruner)}
    canonical = json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _load(methods: Mapping[str, str], name: str) -> Any:
    if name not in methods:
        raise PruningError("method", f"one of {', '.join(sorted(methods))}", name)
    module, _, attribute = methods[name].partition(":")
    return getattr(import_module(module), attribute)


def _checked(cls: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` as constructor arguments, once every name and type is one that `cls` declares."""
    hints = get_type_hints(cls)
    known = {field.name: hints[field.name] for field in fields(cls) if field.name != "schedule"}
    for key, value in params.items():
        if key not in known:
            takes = ", ".join(known) or "nothing"
            raise PruningError(key, f"left out: {cls.name} takes {takes}", value)
        if not _fits(value, known[key]):
            raise PruningError(key, f"of type {_spell(known[key])}", value)
    return {key: _convert(value, known[key]) for key, value in params.items()}


def _fits(value: object, hint: Any) -> bool:
    """Whether `value`, as JSON gives it, is of the annotated type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(v, arguments[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is (NoneType if hint is None else hint)


def _convert(value: Any, hint: Any) -> Any:
    """JSON's list as a tuple, its 2 as 2.0 for a float: equal settings fingerprint alike."""
    if isinstance(value, list):
        return tuple(value)
    floats = hint is float or (float in get_args(hint) and int not in get_args(hint))
    return float(value) if floats and isinstance(value, int) else value


def _spell(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(json.dumps(choice) for choice in get_args(hint))
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)
