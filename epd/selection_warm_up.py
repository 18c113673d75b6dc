"""Vision tokens chosen by every method before the first request: a GPU compiles a kernel at its
first use, and nobody should wait for a compiler.

No kernel that chooses is compiled for the sizes of images, pools, budgets or questions, but for the
greedy choice, whose program holds a power of two of tokens. So each method is run once for every
way through its code, and the greedy choice once for every power of two that a pool may reach.
Methods inside the decoder are run with its own prompts, by `epd.warm_up`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import structlog

from epd.errors import InvalidRequestError
from epd.pruning_spec import PruningSpec
from epd.vision_pool import TokenSelector, blank_pool, check_pruning, make_pools
from epd_kernels.greedy_dpp import LEAST
from epd_pruning.registry import available

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from epd.models.decoder import Decoder
    from epd.models.query import QueryEncoder
    from epd.models.vision import VisionEncoder
    from epd.vision_pool import ImageEncoder

__all__ = ["Run", "choice_runs", "encoder_runs", "run_all", "warm_up_choice", "warm_up_encoder"]

_log = structlog.get_logger("epd.warm_up")
_MOST_SECONDS = 120.0
_NAME, _SIDE = "warm-up", 48
_TOWER = "vision tower"
_QUESTIONS = ("", "What is this?", "What is this, and what is beside it? " * 40)
_COMBINATIONS = ("intersect_fill", "plot_parity", "released")
_WAYS: dict[str, tuple[dict[str, Any], ...]] = {
    "script": ({}, {"graph": "bipartite"}, *({"combine": name} for name in _COMBINATIONS)),
    "visionzip": ({}, {"merging": True}),
}
_QUERY_ENCODERS = ("clip_text", "llm_embed_mean")


class Run(NamedTuple):
    """Something to be done once, for the sake of `method`."""

    method: str
    call: Callable[[], object]


def warm_up_encoder(encoder: VisionEncoder, most_images: int) -> None:
    """Encode and choose once as an encode worker does, up to `most_images` together; on a GPU."""
    if encoder.device.type == "cuda":
        run_all("encode", encoder_runs(encoder, most_images))


def warm_up_choice(queries: QueryEncoder, decoder: Decoder, num_tokens: int) -> None:
    """Choose once as a prefill worker does, from images of `num_tokens`; on a GPU."""
    if decoder.device.type == "cuda":
        run_all("prefill", choice_runs(queries, decoder, num_tokens))


def run_all(
    where: str, runs: Sequence[Run], *, limit: float = _MOST_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Do `runs`, and say how long they took; what fails is logged, and stops nothing.

    None is begun after `limit` seconds.
    """
    start, done = clock(), 0
    for run in runs:
        if clock() - start > limit:
            left = sorted({later.method for later in runs[done:]})
            _log.warning("warm-up cut short", where=where, limit=limit, methods=left)
            break
        done += 1
        try:
            run.call()
        except Exception as error:
            name, text = type(error).__name__, str(error)[:200]
            _log.error("warm-up failed", where=where, method=run.method, error=name, message=text)
    seconds = round(clock() - start, 3)
    _log.info("choice of vision tokens warmed up", where=where, runs=done, seconds=seconds)


def encoder_runs(encoder: ImageEncoder, most_images: int) -> list[Run]:
    """The encoder on batches of every size, and all methods that it can serve on two images."""
    source = np.random.default_rng(0)
    image = source.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)

    def encode(images: int, spec: PruningSpec | None) -> Callable[[], object]:
        return lambda: make_pools(encoder, [image] * images, [spec] * images, [_NAME] * images)

    found = [Run(_TOWER, encode(count, None)) for count in range(1, most_images + 1)]
    for spec in _specs(encoder.num_tokens(_SIDE, _SIDE)):
        if _serves(spec, encoder, None):
            found.append(Run(spec.method, encode(2, spec)))
    return found


def choice_runs(queries: QueryEncoder, decoder: Decoder, num_tokens: int) -> list[Run]:
    """All methods that read a question and can be served, on two pools, asked in several ways."""
    selector = TokenSelector(queries)

    def choose(spec: PruningSpec, question: str) -> Callable[[], object]:
        def call() -> object:
            pool = blank_pool(
                spec, num_tokens, hidden_size=decoder.config.hidden_size, dtype=decoder.dtype,
                device=decoder.device, queries=queries,
            )  # fmt: skip
            return selector.select_all([pool, pool], spec, [question, question])

        return call

    specs = [*_specs(num_tokens), *_pool_specs(num_tokens)]
    return [
        Run(spec.method, choose(spec, question))
        for spec in specs
        if _reads_questions(spec) and _serves(spec, None, queries)
        for question in _QUESTIONS
    ]


def _specs(num_tokens: int) -> Iterator[PruningSpec]:
    """Every way through every method, on a quarter of the tokens."""
    for method in available("token"):
        for way in _WAYS.get(method, ({},)):
            yield from _asked_alike(method, max(num_tokens // 4, 1), way)


def _pool_specs(num_tokens: int) -> Iterator[PruningSpec]:
    """Budgets whose pools fill a program of the greedy choice of each size."""
    size = LEAST
    while size < 2 * num_tokens:
        keep = max(min(size, num_tokens) // 2, 1)
        yield from _asked_alike("script", keep, {"pool_factor": 2.0, "pool_floor": 0.0})
        size *= 2


def _asked_alike(method: str, keep: int, params: dict[str, Any]) -> Iterator[PruningSpec]:
    """The spec, once for each way to read a question if it reads any."""
    spec = PruningSpec(method=method, keep=keep, params=params)
    if not _reads_questions(spec):
        yield spec
        return
    for name in _QUERY_ENCODERS:
        yield PruningSpec(method=method, keep=keep, params=params | {"query_encoder": name})


def _reads_questions(spec: PruningSpec) -> bool:
    return hasattr(spec.pruner(), "query_encoder")


def _serves(
    spec: PruningSpec, encoder: ImageEncoder | None, queries: QueryEncoder | None
) -> bool:  # fmt: skip
    try:
        check_pruning(spec, encoder, queries)
    except InvalidRequestError:
        return False
    return True
