"""Engines whose prefill the benchmark times: one decoder, one core per way to prune."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from epd.config import EngineConfig
from epd.core import EngineCore, KeptTokens, NewSequence
from epd.errors import EPDError
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.request import SamplingParams
from epd_pruning.adaptinfer import AdaptInfer
from epd_pruning.base import VisionInputs
from epd_pruning.script import Script

if TYPE_CHECKING:
    from collections.abc import Sequence

    from epd_pruning.layer_base import LayerBatch
    from epd_services.prefill_bench import Case

__all__ = ["Engine", "Prefill", "PrefillPipeline"]

_BLOCK = 16
_ALIGNED = 768  # width of the text tower's space


@dataclass(frozen=True, slots=True)
class Prefill:
    """Seconds of one prefill of a batch; `selection` and `scoring` are parts of `total`.

    `num_tokens` entered the decoder.
    """

    total: float
    selection: float
    scoring: float
    num_tokens: int


class _Watched(AdaptInfer):
    """AdaptInfer that marks on the device's clock when each choice begins and ends."""

    marks: ClassVar[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = []

    def keep_rows(self, batch: LayerBatch, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not batch.keys.is_cuda:
            return super().keep_rows(batch, num_rows)
        begin, end = _event(), _event()
        begin.record()
        kept = super().keep_rows(batch, num_rows)
        end.record()
        self.marks.append((begin, end))
        return kept


@dataclass(slots=True)
class Engine:
    """A core, the requests of one batch, and how many tokens of each image enter."""

    core: EngineCore
    images: list[list[VisionInputs]]
    prompt: list[int]
    keep: int | None = None
    layer_keep: float | None = None
    query: torch.Tensor | None = None
    pruner: Script = field(default_factory=Script)


class PrefillPipeline:
    """A decoder of a config directory's shape with weights drawn from a seed, and its engines."""

    def __init__(self, config_dir: Path, *, device: str, dtype: torch.dtype, seed: int) -> None:
        self.card = ModelCard.load(config_dir, weights=False)
        self.device = torch.device(device)
        self._dtype = dtype
        self.decoder = Decoder.random(self.card.text, device, dtype, seed)
        self._random = torch.Generator(device).manual_seed(seed)
        self._names = (f"request-{number}" for number in itertools.count())
        vision = self.card.config["vision_config"]
        self.image_tokens = (vision["image_size"] // vision["patch_size"]) ** 2

    def open(self, case: Case, batch: int, *, text_tokens: int) -> tuple[Engine, Engine]:
        """The dense and the pruned engine of a case, on the same vision tokens."""
        images = [[self._image() for _ in range(case.images)] for _ in range(batch)]
        half, image = text_tokens // 2, self.card.image_token_id
        assert image is not None
        prompt = [1] * half + [image] * case.images + [1] * (text_tokens - half)
        longest = text_tokens + case.images * self.image_tokens + 1
        dense = Engine(self._core(batch, longest, None), images, prompt)
        if case.preset is None:
            assert case.keep is not None
            keep = min(case.keep, self.image_tokens)
            query = self._normal(1, _ALIGNED)
            return dense, Engine(dense.core, images, prompt, keep, None, query)
        schedule = AdaptInfer.presets[case.preset]
        layers = self.card.text.num_layers
        counts = schedule.lengths(self.image_tokens, layers)
        average = sum(counts) / layers / self.image_tokens
        core = self._core(batch, longest, _Watched(schedule))
        return dense, Engine(core, images, prompt, None, average)

    def prefill(self, engine: Engine) -> Prefill:
        """Choose, queue and compute every prompt of the batch, up to its first token."""
        _Watched.marks.clear()
        begin = self._synchronize()
        kept = self._choose(engine) if engine.keep is not None else None
        chosen = time.perf_counter()
        for number, images in enumerate(engine.images):
            self._add(engine, images, kept[number] if kept else None)
        num_tokens, answered = 0, 0
        while answered < len(engine.images):
            result = engine.core.step()
            if result.failed:
                raise EPDError(f"a request failed: {result.failed[0].message}")
            num_tokens += result.num_tokens
            answered += len(result.tokens)
        end = self._synchronize()
        scoring = sum(a.elapsed_time(b) for a, b in _Watched.marks) / 1000
        return Prefill(end - begin, chosen - begin if kept else 0.0, scoring, num_tokens)

    def _choose(self, engine: Engine) -> list[list[list[int]]]:
        """The kept indices of every image: both stages of Script, over all images at once."""
        assert engine.keep is not None
        flat = [image for images in engine.images for image in images]
        counts = [engine.keep] * len(flat)
        pools = engine.pruner.prepare_all(flat, counts)
        found = engine.pruner.select_all(pools, counts, queries=[engine.query] * len(flat))
        rows = torch.stack(found).tolist()
        per_request = len(engine.images[0])
        return [rows[i : i + per_request] for i in range(0, len(rows), per_request)]

    def _add(
        self, engine: Engine, images: Sequence[VisionInputs], kept: list[list[int]] | None
    ) -> None:
        name, size = next(self._names), self.image_tokens
        tokens = [image.embeddings for image in images]
        if kept is not None:
            tokens = [
                rows[torch.tensor(keep).to(self.device)]
                for rows, keep in zip(tokens, kept, strict=True)
            ]
        engine.core.add(
            NewSequence(
                request_id=name, attempt=0, image_token_id=self.card.image_token_id,
                prompt_token_ids=engine.prompt, mm_keys=[f"{name}/{i}" for i in range(len(tokens))],
                sampling=SamplingParams(max_tokens=1, ignore_eos=True),
                kept=[KeptTokens(size, keep) for keep in kept] if kept else [],
                layer_keep=engine.layer_keep,
            ),
            tokens,
        )  # fmt: skip

    def _core(self, batch: int, longest: int, pruner: AdaptInfer | None) -> EngineCore:
        """A core that takes the whole batch in one step."""
        config = EngineConfig(
            block_size=_BLOCK, num_blocks=batch * (-(-longest // _BLOCK) + 2), max_num_seqs=batch,
            max_batched_tokens=batch * longest, prefix_cache=False,
        )  # fmt: skip
        core = EngineCore(
            self.decoder, self.card, config=config, device=self.device, layer_pruner=pruner
        )
        core.warm_up(compiled=True)  # untimed runs compile and record the few steps that follow
        return core

    def _image(self) -> VisionInputs:
        width = self.card.text.hidden_size
        return VisionInputs(
            embeddings=0.02 * self._normal(self.image_tokens, width),
            aligned=self._normal(self.image_tokens, _ALIGNED),
        )

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._random, device=self.device, dtype=self._dtype)

    def _synchronize(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
