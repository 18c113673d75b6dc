"""A twin of CUDA graphs for a CPU that spoils its buffers in between, and cores that use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from epd.config import EngineConfig
from epd.core import EngineCore
from epd.graphs import CalledAgain

_JUNK = 0x7F


class Spoiled(CalledAgain):
    """Overwrites inputs after every use: a step that relied on an earlier one would not survive."""

    def __init__(self, bytes_each: int = 0) -> None:
        super().__init__("cpu")
        self.steps = self.recorded = 0
        self._bytes_each = bytes_each
        self._buffers: tuple[torch.Tensor, ...] = ()

    def buffers(self, nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        host, device = super().buffers(nbytes)
        self._buffers += (host, device)
        self._spoil()
        return host, device

    def _spoil(self) -> None:
        for buffer in self._buffers:
            buffer.fill_(_JUNK)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        repeat = super().record(work)
        self.recorded += 1
        self._spoil()

        def repeat_and_spoil() -> None:
            repeat()
            self.steps += 1
            self._spoil()

        return repeat_and_spoil

    def held_bytes(self) -> int:
        return self.recorded * self._bytes_each


def core_maker(layer_bench: Any) -> Callable[..., EngineCore]:
    """Makes cores over the toy decoder; their KV pools are NaN wherever nobody wrote."""

    def make(recorder: CalledAgain | None, **settings: Any) -> EngineCore:
        card: Any = SimpleNamespace(
            revision="r1", eos_token_ids=(2,), max_position=256, path=Path("absent")
        )
        config = EngineConfig(**{"block_size": 4, "num_blocks": 200, **settings})
        core = EngineCore(
            layer_bench.decoder, card, config=config, device="cpu",
            layer_pruner=layer_bench.pruner(), recorder=recorder,
        )  # fmt: skip
        core.warm_up()
        core.pool.fill(float("nan"))
        return core

    return make
