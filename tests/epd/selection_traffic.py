"""A small model with many vision tokens, and random wishes for how they are to be chosen."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epd.errors import InvalidRequestError
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.query import QueryEncoder
from epd.models.tiny import write_tiny_llava, write_tiny_text_tower
from epd.models.vision import VisionEncoder
from epd.pruning_spec import PruningSpec
from epd.vision_pool import TokenSelector, check_pruning, make_pools
from epd_pruning import available

_PATCH, _WORDS = 7, ("what", "is", "the", "colour", "of", "this", "circle", "left")


@dataclass(frozen=True, slots=True)
class Halves:
    """An encode worker's half of the choice, and a prefill worker's."""

    encoder: VisionEncoder
    queries: QueryEncoder
    decoder: Decoder

    @classmethod
    def write(
        cls, path: Path, side: int, device: str, dtype: torch.dtype, *, tower: bool
    ) -> Halves:
        """Of a checkpoint of `side`² vision tokens, with a text tower or without."""
        write_tiny_llava(path, image_size=side * _PATCH, patch_size=_PATCH)
        if tower:
            write_tiny_text_tower(path)
        card = ModelCard.load(path)
        decoder = Decoder.load(card, device, dtype)
        return cls(VisionEncoder.load(card, device, dtype), QueryEncoder(card, decoder), decoder)

    @property
    def num_tokens(self) -> int:
        return self.encoder.num_tokens(1, 1)

    def serve(self, source: random.Random) -> list[str]:
        """Choose from some random images by a random method each, as both workers do; which."""
        images = [_image(source) for _ in range(source.randint(1, 5))]
        specs = [self._spec(source) for _ in images]
        names = [str(source.random()) for _ in images]
        pools = make_pools(self.encoder, images, specs, names)
        selector = TokenSelector(self.queries)
        for pool, spec in zip(pools, specs, strict=True):
            budget = source.choice((None, spec.num_kept(self.num_tokens) // 2 or 1))
            questions = [_question(source) for _ in range(source.randint(1, 2))]
            selector.select_all([pool] * len(questions), spec, questions, budget)
        return [spec.method for spec in specs]

    def _spec(self, source: random.Random) -> PruningSpec:
        while True:
            method = source.choice(available("token"))
            keep: int | float = source.randint(1, self.num_tokens)
            if source.random() < 0.5:
                keep = source.uniform(0.01, 1.0)
            params = _params(method, source)
            spec = PruningSpec.parse({"method": method, "keep": keep, "params": params})
            try:
                check_pruning(spec, self.encoder, self.queries)
            except InvalidRequestError:
                continue
            return spec


def _image(source: random.Random) -> np.ndarray[Any, np.dtype[np.uint8]]:
    pixels = np.random.default_rng(source.randrange(1 << 30))
    shape = (source.randint(9, 80), source.randint(9, 80), 3)
    return pixels.integers(0, 256, shape, dtype=np.uint8)


def _question(source: random.Random) -> str:
    return " ".join(source.choice(_WORDS) for _ in range(source.choice((0, 1, 5, 30, 90))))


def _params(method: str, source: random.Random) -> dict[str, Any]:
    """Some of the parameters of `method`, drawn."""
    draws: dict[str, Callable[[], Any]] = {}
    if method in ("script", "cdpruner", "relevance"):
        draws = {
            "query_encoder": lambda: source.choice(("clip_text", "llm_embed_mean")),
            "relevance_form": lambda: source.choice(("floor", "exp", "raw", "offset")),
            "relevance_sign": lambda: source.choice((-1, 1)),
            "relevance_weight": lambda: source.random() * 0.9,
        }
    if method == "script":
        combinations = ("cascade", "cascade", "intersect_fill", "plot_parity", "released")
        draws |= {
            "combine": lambda: source.choice(combinations),
            "graph": lambda: source.choice(("dense", "bipartite")),
            "graph_keep": lambda: source.choice(("low", "high")),
            "tau": lambda: source.choice((0.1, 0.6, "quantile:0.5")),
            "min_degree": lambda: source.randint(0, 20),
            "gamma": lambda: source.uniform(-2, 2),
            "pool_factor": lambda: source.uniform(1, 4),
            "pool_floor": lambda: source.choice((0.0, 0.0, 0.1, 0.9)),
            "similarity_power": lambda: source.randint(1, 8),
        }
    if method in ("visionzip", "low_resolution"):
        draws["merging"] = lambda: source.random() < 0.5
    if method == "visionzip":
        draws["contextual_share"] = source.random
    if method == "vispruner":
        draws["important_share"] = source.random
    if method == "dart":
        draws["num_pivots"] = lambda: source.randint(1, 20)
    return dict(_drawn(draws, source))


def _drawn(
    draws: dict[str, Callable[[], Any]], source: random.Random
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    for name, draw in draws.items():
        if source.random() < 0.5:
            yield name, draw()
