"""Steps recorded by shape. All find their inputs in one buffer, which the host fills and sends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import torch

from epd.staging import HostArray, Layout

if TYPE_CHECKING:
    from epd.graphs import Recorder

    Fill = Callable[[Sequence[HostArray]], None]
    Make = Callable[[tuple[int, ...], Sequence[torch.Tensor]], Callable[[], None]]

__all__ = ["Recordings"]

_log = structlog.get_logger("epd.core")


@dataclass(frozen=True, slots=True)
class _Recording:
    """The views that the host fills, how much of the buffer it sends, and what repeats the step."""

    arrays: Sequence[HostArray]
    nbytes: int
    repeat: Callable[[], None]


class Recordings:
    """`layout` tells the inputs of a shape, `make` builds the step that reads them."""

    def __init__(
        self, recorder: Recorder, shapes: Sequence[tuple[int, ...]], *,
        layout: Callable[[tuple[int, ...]], Layout], make: Make,
    ) -> None:  # fmt: skip
        self._recorder = recorder
        self._shapes = shapes
        self._layout = layout
        self._make = make
        self._recordings: dict[tuple[int, ...], _Recording] = {}
        self._max_bytes: int | None = None
        largest = max(layout(shape).nbytes for shape in shapes)
        self._host, self._device = recorder.buffers(largest)

    @property
    def ready(self) -> bool:
        """Whether `record` or `defer` was called."""
        return self._max_bytes is not None

    def record(self, kind: str, max_bytes: int, fill: Fill) -> int:
        """How many shapes were recorded, in their order, until recordings hold `max_bytes`.

        The others will run call by call. `fill` writes inputs that leave no trace.
        """
        self._max_bytes = max_bytes
        begin = time.monotonic()
        count = sum(self._add(shape, fill) for shape in self._shapes)
        _log.info(
            "steps recorded", kind=kind, count=count, left_out=len(self._shapes) - count,
            seconds=round(time.monotonic() - begin, 1),
            megabytes=self._recorder.held_bytes() >> 20,
        )  # fmt: skip
        return count

    def defer(self, max_bytes: int) -> None:
        """Let every shape be recorded when it is first asked for."""
        self._max_bytes = max_bytes

    def run(self, shape: tuple[int, ...], fill: Fill) -> None:
        """The step of `shape` on what `fill` writes."""
        recording = self._recordings.get(shape)
        if recording is None:
            self._add(shape, fill)
            return
        self._write(recording.arrays, recording.nbytes, fill)
        recording.repeat()

    def _add(self, shape: tuple[int, ...], fill: Fill) -> bool:
        """Do the step of `shape` once, and note how to repeat it; whether that is a recording."""
        assert self._max_bytes is not None
        layout = self._layout(shape)
        step = self._make(shape, layout.tensors(self._device))
        arrays = layout.arrays(self._host)
        self._write(arrays, layout.nbytes, fill)
        repeat = None
        if self._recorder.held_bytes() <= self._max_bytes:
            repeat = self._recorded(step)
        if repeat is None:
            self._max_bytes = -1  # there will not be room for others either
            step()
        self._recordings[shape] = _Recording(arrays, layout.nbytes, repeat or step)
        return repeat is not None

    def _recorded(self, step: Callable[[], None]) -> Callable[[], None] | None:
        try:
            return self._recorder.record(step)
        except torch.OutOfMemoryError:
            _log.warning("no memory to record a step; it will run call by call")
            return None

    def _write(self, arrays: Sequence[HostArray], nbytes: int, fill: Fill) -> None:
        self._recorder.ready()
        fill(arrays)
        self._recorder.send(self._host[:nbytes], self._device[:nbytes])
