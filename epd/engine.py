"""All three stages in the caller's process: encode, prefill and decode as plain function calls.

    >>> llm = LLM()
    >>> llm.chat("What colour is the circle?", images=["scene.png"]).text

Every distributed run must give the tokens that this gives.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from epd.cache.keys import pixel_digest
from epd.chat import ChatFormatter
from epd.config import EngineConfig
from epd.conversation import Conversation, as_messages, place_images
from epd.core import EngineCore
from epd.demo import CHECKPOINT
from epd.detokenize import Detokenizer
from epd.errors import error_from_code
from epd.graphs import default_recorder
from epd.images import ImageInput, RGBArray, rgb_array
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.query import QueryEncoder
from epd.models.vision import VisionEncoder
from epd.pruning_policy import check_served, simplify
from epd.pruning_spec import PruningSpec
from epd.queries import image_queries
from epd.request import FinishReason, RequestTimeline, SamplingParams, TokenOutput, Usage
from epd.selection_warm_up import warm_up_choice, warm_up_encoder
from epd.step import NewSequence, PrefillDone, SequenceToken, StepResult
from epd.vision_pool import TokenSelector, make_pools, pruned

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = ["LLM", "Completion"]

Prompt = str | list[int]
Images = Sequence[ImageInput]
Pruning = PruningSpec | Mapping[str, Any] | None
Prunings = Pruning | Sequence[Pruning]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer. `logprobs` has an entry per token when the sampling parameters ask for it."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    logprobs: list[TokenOutput] | None
    timeline: RequestTimeline


@dataclass(slots=True, kw_only=True)
class _Job:
    """One request on its way through the stages."""

    name: str
    prompt: list[int]
    images: dict[str, RGBArray]
    keys: list[str]
    pruning: PruningSpec | None
    queries: list[str]
    sampling: SamplingParams
    detokenizer: Detokenizer
    timeline: RequestTimeline
    text: str = ""
    outputs: list[TokenOutput] = field(default_factory=list)
    prefill: PrefillDone | None = None
    finish_reason: FinishReason | None = None


class LLM:
    """A vision-language model in this process. The default model is the built-in one.

    With `random_seed` the weights are random, of the shapes that the model's config.json gives.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        config: EngineConfig | None = None,
        random_seed: int | None = None,
    ) -> None:
        real = random_seed is None
        self.card = ModelCard.load(model if model is not None else CHECKPOINT, weights=real)
        self.formatter = ChatFormatter(self.card)
        self.config = config or EngineConfig()
        if random_seed is None:
            self.vision = VisionEncoder.load(self.card, device, dtype)
            decoder = Decoder.load(self.card, device, dtype)
        else:
            self.vision = VisionEncoder.random(self.card, device, dtype, random_seed)
            decoder = Decoder.random(self.card.text, device, dtype, random_seed)
        self.core = EngineCore(decoder, self.card, config=self.config, device=device)
        self.core.warm_up()
        self.vision.repeat_with(default_recorder(device, graphs=self.config.cuda_graphs))
        queries = QueryEncoder(self.card, decoder)
        self._selector = TokenSelector(queries)
        warm_up_encoder(self.vision, 1)
        warm_up_choice(queries, decoder, self.card.image_tokens)
        self._count = 0

    @overload  # a string is a sequence of strings, but never meant as one
    def chat(  # type: ignore[overload-overlap]
        self, messages: Conversation, *, images: Images = ...,
        sampling: SamplingParams | None = ..., pruning: Pruning = ...,
    ) -> Completion: ...  # fmt: skip

    @overload
    def chat(
        self, messages: Sequence[Conversation], *, images: Sequence[Images] = ...,
        sampling: SamplingParams | Sequence[SamplingParams] | None = ..., pruning: Prunings = ...,
    ) -> list[Completion]: ...  # fmt: skip

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        images: Images | Sequence[Images] = (),
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        pruning: Prunings = None,
    ) -> Completion | list[Completion]:
        """The answer to one conversation, or the answers to a list of them, computed together.

        A conversation is OpenAI-shaped messages, or a string for a single question. A part
        `{"type": "image"}` takes the next of `images`, or carries its own as `"image"`; images
        that no part asks for stand before the first question. `pruning` (a spec or its fields,
        one for all or one each) drops vision tokens; a budget of a whole image drops none.
        """
        single = isinstance(messages, str) or any(isinstance(m, Mapping) for m in messages[:1])
        conversations: Any = [messages] if single else messages
        given: Any = [images] if single else images or [()] * len(conversations)
        resolved = [
            place_images(as_messages(conversation), list(pictures))
            for conversation, pictures in zip(conversations, given, strict=True)
        ]
        specs = self._specs(pruning, len(resolved))
        prompts = [
            (self.formatter.tokenize(turns), pictures,
             image_queries(turns, spec.turns) if spec else [])
            for (turns, pictures), spec in zip(resolved, specs, strict=True)
        ]  # fmt: skip
        completions = self._run(prompts, sampling, specs)
        return completions[0] if single else completions

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, *, images: Images = ..., sampling: SamplingParams | None = ...,
        pruning: Pruning = ...,
    ) -> Completion: ...  # fmt: skip

    @overload
    def generate(
        self, prompts: Sequence[Prompt], *, images: Sequence[Images] = ...,
        sampling: SamplingParams | Sequence[SamplingParams] | None = ..., pruning: Prunings = ...,
    ) -> list[Completion]: ...  # fmt: skip

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        images: Images | Sequence[Images] = (),
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        pruning: Prunings = None,
    ) -> Completion | list[Completion]:
        """The continuation of one prompt, or of a list of them, computed together.

        A prompt is text or token ids, with one placeholder token per image. `pruning` is as in
        `chat`; a method that reads the question reads the text of the prompt.
        """
        single = isinstance(prompts, str) or any(isinstance(p, int) for p in prompts[:1])
        many: Any = [prompts] if single else prompts
        given: Any = [images] if single else images or [()] * len(many)
        ids = [self.formatter.encode(p) if isinstance(p, str) else p for p in many]
        encoded = [
            (prompt, list(pictures), [self.formatter.tokenizer.decode(prompt)] * len(pictures))
            for prompt, pictures in zip(ids, given, strict=True)
        ]
        completions = self._run(encoded, sampling, self._specs(pruning, len(ids)))
        return completions[0] if single else completions

    def _run(
        self,
        prompts: list[tuple[list[int], list[ImageInput], list[str]]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        specs: list[PruningSpec | None],
    ) -> list[Completion]:
        """Feed jobs in waves, so that only the vision tokens of one wave are alive at a time."""
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(prompts)
        jobs = [
            self._job(*prompt, one, spec)
            for prompt, one, spec in zip(prompts, sampling, specs, strict=True)
        ]
        waiting, live = deque(jobs), {job.name: job for job in jobs}
        uses = Counter(key for job in jobs for key in set(job.keys))
        encoded: dict[str, list[torch.Tensor]] = {}
        try:
            while waiting or self.core.has_work():
                if waiting and not self.core.stats().waiting:
                    size = min(len(waiting), self.config.max_num_seqs)
                    self._feed([waiting.popleft() for _ in range(size)], encoded, uses)
                self._collect(self.core.step(), live)
        finally:
            for job in jobs:  # an error or an interrupt leaves nothing behind
                self.core.cancel(job.name)
        return [_completion(job) for job in jobs]

    def _specs(self, pruning: Prunings, count: int) -> list[PruningSpec | None]:
        """One checked spec per prompt; None where nothing is pruned."""
        each: Any = pruning if isinstance(pruning, Sequence) else [pruning] * count
        return [self._spec(one) for one in each]

    def _spec(self, asked: Pruning) -> PruningSpec | None:
        if asked is None:
            return None
        spec = PruningSpec.parse(asked)
        layer_method = self.config.layer_pruning
        check_served(spec, layer_method.partition(":")[0] if layer_method else None)
        return simplify(spec, self.card.image_tokens)

    def _job(
        self,
        prompt: list[int],
        images: list[ImageInput],
        queries: list[str],
        sampling: SamplingParams,
        pruning: PruningSpec | None,
    ) -> _Job:
        sampling.validate()
        self._count += 1
        timeline = RequestTimeline(time.monotonic)
        arrays = [rgb_array(image) for image in images]
        made_by = f":{pruning.fingerprint()}" if pruning is not None else ""
        keys = [pixel_digest(a.shape[1], a.shape[0], a.data) + made_by for a in arrays]
        return _Job(
            name=f"local-{self._count}", prompt=prompt, images=dict(zip(keys, arrays, strict=True)),
            keys=keys, pruning=pruning if arrays else None, queries=queries,
            sampling=sampling, timeline=timeline,
            detokenizer=Detokenizer(self.formatter.tokenizer, sampling.stop),
        )  # fmt: skip

    def _feed(
        self, jobs: list[_Job], encoded: dict[str, list[torch.Tensor]], uses: Counter[str]
    ) -> None:
        """Encode each distinct image of `jobs` once and queue the jobs for prefill."""
        missing = {
            key: (array, job.pruning)
            for job in jobs
            for key, array in job.images.items()
            if key not in encoded
        }
        start = time.monotonic()
        arrays, specs = [a for a, _ in missing.values()], [s for _, s in missing.values()]
        pools = make_pools(self.vision, arrays, specs, [key.partition(":")[0] for key in missing])
        seconds = time.monotonic() - start
        encoded.update(zip(missing, pools, strict=True))
        for job in jobs:
            if job.keys:
                job.timeline.add("encode", seconds)
            self._add(job, [encoded[key] for key in job.keys])
            _release(set(job.keys), encoded, uses)
            job.images.clear()

    def _add(self, job: _Job, pools: list[list[torch.Tensor]]) -> None:
        sequence = NewSequence(
            request_id=job.name, attempt=0, prompt_token_ids=job.prompt,
            image_token_id=self.card.image_token_id, mm_keys=job.keys, sampling=job.sampling,
        )  # fmt: skip
        queries = job.queries or [""] * len(pools)
        chosen = self._selector.select_all(pools, job.pruning, queries)
        if job.pruning is not None:
            sequence = pruned(sequence, job.pruning, [kept for _, kept in chosen])
        self.core.add(sequence, [tokens for tokens, _ in chosen])

    def _collect(self, step: StepResult, live: dict[str, _Job]) -> None:
        for failure in step.failed:
            raise error_from_code(failure.code, failure.message)
        for done in step.prefilled:
            job = live[done.request_id]
            job.prefill = done
            job.timeline.add("queue", done.queue_seconds)
            job.timeline.add("prefill", done.prefill_seconds)
        for token in step.tokens:
            self._take(live[token.request_id], token)

    def _take(self, job: _Job, token: SequenceToken) -> None:
        job.timeline.token()
        job.outputs.append(token.output)
        job.text += job.detokenizer.push([token.output.token_id])
        if job.detokenizer.stopped is not None:
            job.finish_reason = FinishReason.STOP
            self.core.cancel(job.name)
        elif token.finish_reason is not None:
            job.finish_reason = token.finish_reason
            job.text += job.detokenizer.finish()
        if job.finish_reason is not None:
            job.timeline.mark("finished")


def _release(
    keys: Iterable[str], encoded: dict[str, list[torch.Tensor]], uses: Counter[str]
) -> None:
    """Forget vision tokens that no later job of the call needs."""
    for key in keys:
        uses[key] -= 1
        if uses[key] == 0:
            del encoded[key]


def _completion(job: _Job) -> Completion:
    assert job.prefill is not None
    assert job.finish_reason is not None
    return Completion(
        text=job.text, token_ids=[output.token_id for output in job.outputs],
        finish_reason=job.finish_reason, timeline=job.timeline,
        logprobs=job.outputs if job.sampling.logprobs is not None else None,
        usage=Usage(
            prompt_tokens=job.prefill.prompt_tokens, completion_tokens=len(job.outputs),
            image_tokens=job.prefill.image_tokens, cached_tokens=job.prefill.cached_tokens,
            image_tokens_before=job.prefill.image_tokens_before,
        ),
    )  # fmt: skip
