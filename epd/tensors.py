"""Tensor and `Blob` or cache entry, both ways: the only module that knows the two worlds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from epd.cache.base import CachedTokens
from epd.errors import WireError
from epd.wire import DTYPE_BYTES, Blob

__all__ = ["dtype_name", "from_blob", "from_cached", "to_blob", "to_cached", "torch_dtype"]

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
    return Blob(name, tuple(tensor.shape), flat.numpy().data)


def from_blob(blob: Blob, device: torch.device | str = "cpu") -> torch.Tensor:
    """A tensor over a checked blob's bytes, moved to `device`; on the CPU the bytes are copied
    once.
    """
    if 0 in blob.shape:
        return torch.empty(blob.shape, dtype=torch_dtype(blob.dtype), device=device)
    raw = torch.frombuffer(bytearray(blob.data), dtype=torch.uint8)
    return raw.view(torch_dtype(blob.dtype)).reshape(blob.shape).to(device)


def to_cached(tensors: Sequence[torch.Tensor]) -> CachedTokens:
    """A cache entry of vision tokens [tokens, hidden] and the tensors beside them."""
    first, *beside = blobs = [to_blob(tensor) for tensor in tensors]
    data = first.data if not beside else b"".join(blob.data for blob in blobs)
    rows, columns = first.shape
    described = tuple((blob.dtype, blob.shape) for blob in beside)
    return CachedTokens(first.dtype, (rows, columns), data, described)


def from_cached(value: CachedTokens, device: torch.device | str = "cpu") -> list[torch.Tensor]:
    """The tensors of a cache entry, copied."""
    return [from_blob(Blob(*part), device) for part in value.tensors]
