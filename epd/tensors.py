"""Tensor and `Blob`, both ways: the only module that knows the two worlds."""

from __future__ import annotations

import torch

from epd.errors import WireError
from epd.wire import DTYPE_BYTES, Blob

__all__ = ["dtype_name", "from_blob", "to_blob", "torch_dtype"]

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The wire name of a dtype. Raises `WireError` for one that may not travel."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise WireError(f"{dtype} may not travel") from None


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a wire name. Raises `WireError` for an unknown one."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise WireError("unknown dtype") from None


def to_blob(tensor: torch.Tensor) -> Blob:
    """The bytes of a tensor (copied to host memory if need be); the tensor must not change
    until it is sent.
    """
    name = dtype_name(tensor.dtype)
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return Blob(name, tuple(tensor.shape), memoryview(flat.numpy()))


def from_blob(blob: Blob, device: torch.device | str = "cpu") -> torch.Tensor:
    """A tensor over a checked blob's bytes, moved to `device`; on the CPU the bytes are copied
    once.
    """
    if 0 in blob.shape:
        return torch.empty(blob.shape, dtype=torch_dtype(blob.dtype), device=device)
    raw = torch.frombuffer(bytearray(blob.data), dtype=torch.uint8)
    return raw.view(torch_dtype(blob.dtype)).reshape(blob.shape).to(device)
