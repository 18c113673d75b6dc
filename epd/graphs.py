"""Work recorded once and repeated on the same buffers: as a CUDA graph, or by calling it again.

A graph repeats kernels with the very addresses and sizes of its recording and costs the host one
call, whatever their number.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Work = Callable[[], None]

__all__ = ["CalledAgain", "CudaGraphs", "Recorder", "default_recorder"]


class Recorder(Protocol):
    """Where recorded work finds its inputs, and how it is repeated."""

    device: torch.device

    def buffers(self, nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 buffers of `nbytes`, on the host and on the device."""
        ...

    def ready(self) -> None:
        """Wait until the host buffer may be written again."""
        ...

    def send(self, host: torch.Tensor, device: torch.Tensor) -> None:
        """Copy one to the other before whatever is repeated next."""
        ...

    def record(self, work: Work) -> Work:
        """Do `work` once; what repeats it. It takes nothing, and leaves its results in tensors."""
        ...

    def held_bytes(self) -> int:
        """Device memory that recordings hold by now."""
        ...


class CalledAgain:
    """Repeats work by calling it: a GPU without graphs, and, on a CPU, the twin for tests."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._sent: torch.cuda.Event | None = None
        if self.device.type == "cuda":
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def buffers(self, nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As of `Recorder`; the host's is pinned where that matters."""
        pinned = self.device.type == "cuda"
        host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return host, torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def ready(self) -> None:
        """As of `Recorder`; after a step was read back there is nothing to wait for."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, host: torch.Tensor, device: torch.Tensor) -> None:
        """As of `Recorder`."""
        device.copy_(host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def record(self, work: Work) -> Work:
        """As of `Recorder`."""
        work()
        return work

    def held_bytes(self) -> int:
        """None."""
        return 0


class CudaGraphs(CalledAgain):
    """Repeats work as CUDA graphs that share one pool of scratch memory.

    They must not run at the same time, and nothing they allocate outlives them but by their pool.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._held = 0

    def record(self, work: Work) -> Work:
        """As of `Recorder`. The first run compiles kernels and makes what is made at first use."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
            self._stream.synchronize()
            free = self._free_bytes()
            # other threads may go on using the device
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # of a broken recording
                    graph.capture_end()
                raise
            graph.capture_end()
        self._held += max(0, free - self._free_bytes())
        current.wait_stream(self._stream)
        return graph.replay

    def held_bytes(self) -> int:
        """Free memory that went while steps were recorded."""
        return self._held

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]


def default_recorder(device: torch.device | str, *, graphs: bool) -> Recorder | None:
    """CUDA graphs on a GPU, repeated calls there without `graphs`, None on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    return CudaGraphs(device) if graphs else CalledAgain(device)
