"""What config.json says about quantised weights, without torch.

Only what decides the arithmetic is read here. How the tensors of a layer are laid out is told by
their names (`epd.models.layouts`), since writers disagree with their own declarations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epd.errors import CheckpointError
from epd.models.files import problem

__all__ = ["FORMAT_VERSIONS", "KV_FORMATS", "MARKS", "SCHEMES", "Quantization"]

FORMAT_VERSIONS = (1, 2)
"""Of our own layout: 1 has quantised language layers alone, 2 a head or a vision side as well."""

MARKS = ("weight_codes", "weight_packed", "weight_scale", "qweight", "B")
"""Tensors that a quantised linear layer has, whatever its layout, and a plain one has not."""

KV_FORMATS = ("bf16", "fp8", "int4")
SCHEMES = ("w4a16", "w4a8-fp8", "w4a8-int8", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Bits of weights and activations (`scheme`), and `method`, who wrote the tensors.

    `kv` is how keys and values are to be held, as the checkpoint was calibrated.

    `zero_offset` is what a GPTQ file leaves out of its stored zeros: 1 in its first version, 0 in
    its second. `act_order` is whether it says that groups follow an index of their own.
    """

    method: str
    scheme: str
    zero_offset: int = 0
    act_order: bool = False
    kv: str = "bf16"

    @classmethod
    def from_config(cls, raw: object) -> Quantization:
        """The facts of a `quantization_config`; `CheckpointError` for one that is not served."""
        if not isinstance(raw, Mapping):
            raise _unsupported("quantization_config", raw, "an object")
        method = raw.get("quant_method")
        if method not in _READERS:
            raise _unsupported("quant_method", method, ", ".join(_READERS))
        return _READERS[method](raw)


def _own(raw: Mapping[str, Any]) -> Quantization:
    if raw.get("format_version") not in FORMAT_VERSIONS:
        supported = ", ".join(map(str, FORMAT_VERSIONS))
        raise _unsupported("format_version", raw.get("format_version"), supported)
    if raw.get("scheme") not in SCHEMES:
        raise _unsupported("scheme", raw.get("scheme"), ", ".join(SCHEMES))
    if raw.get("kv", "bf16") not in KV_FORMATS:
        raise _unsupported("kv", raw["kv"], ", ".join(KV_FORMATS))
    return Quantization(method="epd", scheme=raw["scheme"], kv=raw.get("kv", "bf16"))


def _compressed_tensors(raw: Mapping[str, Any]) -> Quantization:
    if raw.get("transform_config"):
        raise _unsupported("transform_config", "online transforms", "none")
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _unsupported("config_groups", groups, "at least one group")
    heads = {name: group for name, group in groups.items() if _targets_head(group)}
    if any(_group_scheme(group) != "fp8" for group in heads.values()):
        raise _unsupported("a config group", "a head that is not in FP8", "FP8 or plain heads")
    others = [group for name, group in groups.items() if name not in heads]
    schemes = {_group_scheme(group) for group in others or heads.values()}
    if len(schemes) > 1:
        raise _unsupported("config_groups", sorted(schemes), "one scheme for all layers")
    return Quantization(method="compressed-tensors", scheme=schemes.pop())


def _targets_head(group: object) -> bool:
    """Whether a group is about the LM head alone."""
    targets = group.get("targets") if isinstance(group, Mapping) else None
    named = isinstance(targets, list) and bool(targets)
    return named and all("lm_head" in str(target) for target in targets or ())


def _group_scheme(group: object) -> str:
    section = group if isinstance(group, Mapping) else {}
    weights, inputs = section.get("weights"), section.get("input_activations")
    kind = _kind(weights), _kind(inputs)
    schemes: dict[tuple[str | None, str | None], str] = {
        ("int4", None): "w4a16", ("int4", "float8"): "w4a8-fp8", ("int4", "int8"): "w4a8-int8",
        ("float8", "float8"): "fp8",
    }  # fmt: skip
    found = schemes.get(kind)
    if found is None:
        supported = "int4 weights with float, FP8 or INT8 inputs, or FP8 weights with FP8 inputs"
        raise _unsupported("a config group", f"weights {kind[0]}, inputs {kind[1]}", supported)
    return found


def _kind(section: object) -> str | None:
    if not isinstance(section, Mapping):
        return None
    return f"{section.get('type', 'int')}{section.get('num_bits', 8)}"


def _gptq(raw: Mapping[str, Any]) -> Quantization:
    _four_bits(raw.get("bits"))
    stored = raw.get("checkpoint_format") or "gptq"
    if stored not in ("gptq", "gptq_v2"):
        raise _unsupported("checkpoint_format", stored, "gptq, gptq_v2")
    return Quantization(
        method="gptq", scheme="w4a16", zero_offset=int(stored == "gptq"),
        act_order=raw.get("desc_act") is True,
    )  # fmt: skip


def _awq(raw: Mapping[str, Any]) -> Quantization:
    _four_bits(raw.get("bits", raw.get("w_bit")))
    version = str(raw.get("version", "gemm")).lower()
    if version != "gemm":
        raise _unsupported("AWQ version", version, "gemm")
    return Quantization(method="awq", scheme="w4a16")


def _qqq(raw: Mapping[str, Any]) -> Quantization:
    _four_bits(raw.get("bits", raw.get("wbits")))
    return Quantization(method="qqq", scheme="w4a8-int8")


def _four_bits(bits: object) -> None:
    if bits != 4:
        raise _unsupported("weight bits", bits, "4")


_READERS = {
    "epd": _own,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "qqq": _qqq,
}


def _unsupported(what: str, value: object, supported: str) -> CheckpointError:
    return problem(
        "Cannot serve this quantised checkpoint.",
        f"Its quantization_config has {what}: {str(value)[:100]}.",
        f"Supported: {supported}.",
    )
