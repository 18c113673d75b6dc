"""Host arrays on their way to the device, many in one buffer and one copy; and numbers back.

Each array begins at a multiple of 16 bytes, so that kernels compiled for one step fit every step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["HostArray", "Layout", "read_back", "send", "send_all"]

HostArray = np.ndarray[Any, np.dtype[Any]]

_ALIGNMENT = 16
_DTYPES = {
    np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32,
    np.dtype(np.float64): torch.float64, np.dtype(np.bool_): torch.bool,
}  # fmt: skip


class Layout:
    """Where arrays of the given shapes and dtypes lie in one buffer of `nbytes` bytes."""

    def __init__(self, fields: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
        self._fields: list[tuple[int, int, tuple[int, ...], np.dtype[Any]]] = []
        self.nbytes = 0
        for shape, dtype in fields:
            start = -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT
            self.nbytes = start + math.prod(shape) * dtype.itemsize
            self._fields.append((start, self.nbytes, shape, dtype))

    def arrays(self, buffer: torch.Tensor) -> list[HostArray]:
        """The arrays in a host `buffer`, uint8, as views."""
        data = buffer.numpy()
        return [data[a:b].view(dtype).reshape(shape) for a, b, shape, dtype in self._fields]

    def tensors(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The same in a `buffer` anywhere."""
        return [buffer[a:b].view(_DTYPES[dtype]).view(shape) for a, b, shape, dtype in self._fields]


def send(array: HostArray, device: torch.device) -> torch.Tensor:
    """`array` on `device`, without waiting for it."""
    return send_all([array], device)[0]


def send_all(arrays: Sequence[HostArray], device: torch.device) -> list[torch.Tensor]:
    """The arrays on `device`, in one copy and without waiting for it."""
    if device.type != "cuda":
        return [torch.from_numpy(array) for array in arrays]
    layout = Layout([(array.shape, array.dtype) for array in arrays])
    # from pinned memory the copy does not wait for the GPU
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=True)
    for place, array in zip(layout.arrays(buffer), arrays, strict=True):
        place[...] = array
    return layout.tensors(buffer.to(device, non_blocking=True))


def read_back(tensor: torch.Tensor) -> list[int]:
    """The numbers of an int64 `tensor` [S], once the device has them.

    The wait is for an event, so that no copy to ordinary memory waits inside the driver while other
    threads, like one that encodes images, want to launch.
    """
    if tensor.is_cuda:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(tensor.device))
        copied.synchronize()
        tensor = host
    numbers: list[int] = tensor.tolist()
    return numbers
