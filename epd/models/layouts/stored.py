"""Which layout a layer is in, by the names of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epd.models.layouts import awq, compressed_tensors, gptq, own, qqq
from epd.models.layouts.source import LayerSource
from epd.models.quantization import MARKS
from epd_kernels import FormatError, Fp8Weight, QuantWeight

__all__ = ["StoredLayer", "StoredWeight", "is_quantized", "read_linear"]

StoredWeight = QuantWeight | Fp8Weight


@dataclass(frozen=True, slots=True, eq=False)
class StoredLayer:
    """A linear layer in the canonical form, on the host."""

    weight: StoredWeight
    bias: torch.Tensor | None


def is_quantized(source: LayerSource) -> bool:
    """Whether the layer is stored in any of the quantised layouts."""
    return any(source.has(mark) for mark in MARKS)


def read_linear(source: LayerSource) -> StoredLayer:
    """The layer in the canonical form. Raises `CheckpointError` naming the tensor at fault."""
    try:
        weight = _read(source)
    except FormatError as error:
        source.refuse("*", "weights the kernels can hold", str(error))
    bias = None
    if source.has("bias"):
        floats = (torch.float16, torch.bfloat16, torch.float32)
        bias = source.get("bias", floats).view(-1)
        if len(bias) != source.rows:
            source.refuse("bias", f"{source.rows} numbers", str(len(bias)))
    return StoredLayer(weight, bias)


def _read(source: LayerSource) -> StoredWeight:
    if source.has("weight_codes"):
        return own.read(source)
    if source.has("weight_packed") or source.has("weight_scale"):
        return compressed_tensors.read(source)
    if source.has("B"):
        return qqq.read(source)
    # both write qweight: GPTQ packs along K, AWQ along N
    rows = source.checkpoint.tensor(f"{source.prefix}.qweight").shape[0]
    if rows == source.width and rows != source.width // 8:
        return awq.read(source)
    return gptq.read(source)
