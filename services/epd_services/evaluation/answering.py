"""Answers of one method at one budget, through the same engine core that serves.

Questions run in waves: every prompt of a wave is prefilled together, then all of them decode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import torch

from epd.chat import ChatFormatter
from epd.config import EngineConfig
from epd.core import EngineCore
from epd.errors import error_from_code
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.query import QueryEncoder
from epd.request import SamplingParams
from epd.step import KeptTokens, NewSequence
from epd_services.evaluation.features import Encoded, Stopwatch, query_of
from epd_services.evaluation.questions import Question

if TYPE_CHECKING:
    from epd_pruning.base import TokenPruner, VisionInputs
    from epd_pruning.layer_base import LayerPruner
    from epd_services.evaluation.methods import Method

__all__ = ["Answers", "Engine", "Selected", "prompt_of"]


@dataclass(frozen=True, slots=True)
class Selected:
    """The survivors of one image: their tokens [k, D] and where they stood."""

    tokens: torch.Tensor
    kept: KeptTokens | None


@dataclass(slots=True)
class Answers:
    """Texts in the order of the questions, and by stage the seconds of a question in each wave."""

    texts: list[str] = field(default_factory=list)
    waves: list[dict[str, float]] = field(default_factory=list)

    @property
    def seconds(self) -> dict[str, float]:
        """Per question: the median wave, which a pause of the machine does not move."""
        stages = dict.fromkeys(stage for wave in self.waves for stage in wave)
        return {stage: median(wave.get(stage, 0.0) for wave in self.waves) for stage in stages}


def prompt_of(formatter: ChatFormatter, question: Question) -> list[int]:
    """Token ids of the question behind its images, as chat requests are tokenised."""
    parts = [{"type": "image"} for _ in question.images]
    content = [*parts, {"type": "text", "text": question.question}]
    return formatter.tokenize([{"role": "user", "content": content}])


@dataclass(slots=True)
class Engine:
    """One decoder and the prompts of all questions. `batch` questions make a wave."""

    card: ModelCard
    decoder: Decoder
    formatter: ChatFormatter
    queries: QueryEncoder
    questions: Sequence[Question]
    encoded: Encoded
    batch: int
    max_tokens: int
    prompts: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.prompts = [prompt_of(self.formatter, question) for question in self.questions]

    def answer(
        self,
        method: Method | None,
        budget: float,
        *,
        pruner: TokenPruner | None = None,
        layer_pruner: LayerPruner | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> Answers:
        """Greedy answers under `method` at `budget`; None: nothing is pruned."""
        core = self._core(layer_pruner)
        first = range(min(self.batch, len(self.prompts)))
        self._wave(first, core, method, budget, pruner, Stopwatch(self.decoder.device))  # warm-up
        answers = Answers()
        for begin in range(0, len(self.prompts), self.batch):
            numbers = range(begin, min(begin + self.batch, len(self.prompts)))
            watch = Stopwatch(self.decoder.device)
            answers.texts += self._wave(numbers, core, method, budget, pruner, watch)
            answers.waves.append({k: v / len(numbers) for k, v in watch.seconds.items()})
            advance(numbers.stop)
        return answers

    def _wave(
        self,
        numbers: range,
        core: EngineCore,
        method: Method | None,
        budget: float,
        pruner: TokenPruner | None,
        watch: Stopwatch,
    ) -> list[str]:
        with watch.time("selector"):
            selected = [self._select(number, method, budget, pruner) for number in numbers]
        for number, images in zip(numbers, selected, strict=True):
            sequence = self._sequence(number, images, method, budget)
            core.add(sequence, [image.tokens for image in images])
        waiting = {str(number) for number in numbers}
        tokens: dict[str, list[int]] = {str(number): [] for number in numbers}
        while core.has_work():
            with watch.time("prefill" if waiting else "decode"):
                step = core.step()
            for failure in step.failed:
                raise error_from_code(failure.code, failure.message)
            waiting -= {done.request_id for done in step.prefilled}
            for token in step.tokens:
                tokens[token.request_id].append(token.output.token_id)
        return [self.formatter.tokenizer.decode(ids) for ids in tokens.values()]

    def _select(
        self, number: int, method: Method | None, budget: float, pruner: TokenPruner | None
    ) -> list[Selected]:
        images = self.encoded.of(number)
        if pruner is None or method is None:
            return [Selected(image.embeddings, None) for image in images]
        query = query_of(self.questions[number].question, pruner, self.queries)
        return [_selected(pruner, image, method, budget, query) for image in images]

    def _sequence(
        self, number: int, images: list[Selected], method: Method | None, budget: float
    ) -> NewSequence:
        size = self.encoded.of(number)[0].num_tokens
        average = None if method is None else method.layer_average(size, budget)
        return NewSequence(
            request_id=str(number), attempt=0, prompt_token_ids=self.prompts[number],
            image_token_id=self.card.image_token_id, mm_keys=self.encoded.keys[number],
            sampling=SamplingParams(temperature=0.0, max_tokens=self.max_tokens),
            kept=[image.kept for image in images], layer_keep=average,
        )  # fmt: skip

    def _core(self, layer_pruner: LayerPruner | None) -> EngineCore:
        """A core with room for one whole wave, prefilled in one step, nothing shared."""
        longest = max(
            len(prompt) + sum(image.num_tokens for image in self.encoded.of(number))
            for number, prompt in enumerate(self.prompts)
        )
        config = EngineConfig(
            num_blocks=self.batch * ((longest + self.max_tokens) // EngineConfig().block_size + 3),
            max_num_seqs=self.batch, max_batched_tokens=self.batch * (longest + 1),
            prefix_cache=False,
        )  # fmt: skip
        device = self.decoder.device
        return EngineCore(
            self.decoder, self.card, config=config, device=device, layer_pruner=layer_pruner
        )


def _selected(
    pruner: TokenPruner,
    image: VisionInputs,
    method: Method,
    budget: float,
    query: torch.Tensor | None,
) -> Selected:
    num_kept = method.entering(image.num_tokens, budget)
    pool = pruner.prepare(image, num_kept)
    indices = pruner.select(pool, num_kept, query=query)
    kept = KeptTokens(image.num_tokens, indices.tolist(), method.name)
    return Selected(pool.gather(indices), kept)
