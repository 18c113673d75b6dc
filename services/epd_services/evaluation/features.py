"""What pruners read: images through the encoder, once for all methods, and questions as vectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from epd.cache.keys import pixel_digest
from epd.images import rgb_array
from epd_pruning.base import VisionInputs
from epd_pruning.relevance import ConditionedPruner

if TYPE_CHECKING:
    from epd.models.query import QueryEncoder
    from epd.models.vision import VisionEncoder
    from epd_pruning.base import TokenPruner
    from epd_services.evaluation.questions import Question

__all__ = [
    "Encoded",
    "Stopwatch",
    "encode_all",
    "encoder_seconds",
    "query_macs",
    "query_of",
    "with_sign",
]

_TIMED_IMAGES = 32


class Stopwatch:
    """Seconds by name. On a GPU every reading waits for the work that was queued."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._wait: Callable[[], Any] = (
            (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
        )

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to `name`."""
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@dataclass(frozen=True, slots=True)
class Encoded:
    """Images by content: `inputs` of each digest, and the `keys` of every question's images."""

    inputs: dict[str, VisionInputs]
    keys: list[list[str]]

    def of(self, question: int) -> list[VisionInputs]:
        """The images of one question, in order."""
        return [self.inputs[key] for key in self.keys[question]]


def encode_all(
    encoder: VisionEncoder,
    questions: Sequence[Question],
    needs: frozenset[str],
    *,
    batch: int,
    advance: Callable[[int], None],
) -> Encoded:
    """Every distinct image once, with all tensors that `needs` names. Raises `MediaError`."""
    found: dict[str, VisionInputs] = {}
    keys: list[list[str]] = []
    for begin in range(0, len(questions), batch):
        fresh: dict[str, Any] = {}
        for question in questions[begin : begin + batch]:
            arrays = [rgb_array(image) for image in question.images]
            keys.append([pixel_digest(a.shape[1], a.shape[0], a.data) for a in arrays])
            fresh.update(zip(keys[-1], arrays, strict=True))
        wanted = [key for key in fresh if key not in found]
        inputs = encoder.encode_inputs([fresh[key] for key in wanted], needs)
        for key, image in zip(wanted, inputs, strict=True):
            found[key] = replace(image, seed=int(key[:15], 16))
        advance(min(begin + batch, len(questions)))
    return Encoded(found, keys)


def encoder_seconds(
    encoder: VisionEncoder, questions: Sequence[Question], needs: frozenset[str]
) -> float:
    """Seconds to encode one image in a batch of up to 32, `needs` included, after a warm-up."""
    images = [rgb_array(image) for question in questions for image in question.images]
    images = images[:_TIMED_IMAGES]
    encoder.encode_inputs(images[:2], needs)
    watch = Stopwatch(encoder.device)
    with watch.time("encode"):
        encoder.encode_inputs(images, needs)
    return watch.seconds["encode"] / len(images)


def with_sign(pruner: TokenPruner, queries: QueryEncoder) -> TokenPruner:
    """`pruner`, reading the text tower's similarities by the checkpoint's own sign.

    One that was given a sign, or reads no tower, stays as it is.
    """
    if not isinstance(pruner, ConditionedPruner) or pruner.query_encoder != "clip_text":
        return pruner
    return replace(pruner, relevance_sign=pruner.relevance_sign or (1 if queries.sign > 0 else -1))


def query_of(text: str, pruner: TokenPruner, queries: QueryEncoder) -> torch.Tensor | None:
    """The question as the vectors [M, C] that `pruner` compares with; None if it asks none.

    Computed every time, since a selector's seconds hold it.
    """
    if not isinstance(pruner, ConditionedPruner):
        return None
    if pruner.query_encoder == "clip_text" and queries.tower is not None:
        return queries.tower.encode(text)
    return queries.encode(pruner.query_encoder, text)


def query_macs(num_tokens: int, pruner: TokenPruner, queries: QueryEncoder) -> int:
    """Multiply-accumulates of the text tower's matrices for a question of `num_tokens`."""
    asks = isinstance(pruner, ConditionedPruner) and pruner.query_encoder == "clip_text"
    if not asks or queries.tower is None:
        return 0
    named = queries.tower.model.named_parameters()
    sizes: list[int] = [p.numel() for n, p in named if p.dim() == 2 and "embedding" not in n]
    return num_tokens * sum(sizes)
