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
from epd.core import EngineCore
from epd.demo import CHECKPOINT
from epd.detokenize import Detokenizer
from epd.errors import InvalidRequestError, error_from_code
from epd.images import ImageInput, RGBArray, rgb_array
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.vision import VisionEncoder
from epd.request import FinishReason, RequestTimeline, SamplingParams, TokenOutput, Usage
from epd.step import NewSequence, PrefillDone, SequenceToken, StepResult

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = ["LLM", "Completion"]

Conversation = str | Sequence[Mapping[str, Any]]
Prompt = str | list[int]
Images = Sequence[ImageInput]


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
        self._count = 0

    @overload  # a string is a sequence of strings, but never meant as one
    def chat(  # type: ignore[overload-overlap]
        self, messages: Conversation, *, images: Images = ...,
        sampling: SamplingParams | None = ...,
    ) -> Completion: ...  # fmt: skip

    @overload
    def chat(
        self, messages: Sequence[Conversation], *, images: Sequence[Images] = ...,
        sampling: SamplingParams | Sequence[SamplingParams] | None = ...,
    ) -> list[Completion]: ...  # fmt: skip

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        images: Images | Sequence[Images] = (),
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Completion | list[Completion]:
        """The answer to one conversation, or the answers to a list of them, computed together.

        A conversation is OpenAI-shaped messages, or a string for a single question. A part
        `{"type": "image"}` takes the next of `images`, or carries its own as `"image"`; images
        that no part asks for stand before the first question.
        """
        single = isinstance(messages, str) or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        given: Any = [images] if single else images or [()] * len(conversations)
        resolved = [
            _place_images(_as_messages(conversation), list(pictures))
            for conversation, pictures in zip(conversations, given, strict=True)
        ]
        prompts = [(self.formatter.tokenize(turns), pictures) for turns, pictures in resolved]
        completions = self._run(prompts, sampling)
        return completions[0] if single else completions

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, *, images: Images = ..., sampling: SamplingParams | None = ...
    ) -> Completion: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], *, images: Sequence[Images] = ...,
        sampling: SamplingParams | Sequence[SamplingParams] | None = ...,
    ) -> list[Completion]: ...  # fmt: skip

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        images: Images | Sequence[Images] = (),
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Completion | list[Completion]:
        """The continuation of one prompt, or of a list of them, computed together.

        A prompt is text or token ids, with one placeholder token per image.
        """
        single = isinstance(prompts, str) or isinstance(prompts[0], int)
        many: Any = [prompts] if single else prompts
        given: Any = [images] if single else images or [()] * len(many)
        encoded = [
            (self.formatter.encode(prompt) if isinstance(prompt, str) else prompt, list(pictures))
            for prompt, pictures in zip(many, given, strict=True)
        ]
        completions = self._run(encoded, sampling)
        return completions[0] if single else completions

    def _run(
        self,
        prompts: list[tuple[list[int], list[ImageInput]]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Completion]:
        """Feed jobs in waves, so that only the vision tokens of one wave are alive at a time."""
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(prompts)
        jobs = [self._job(*prompt, one) for prompt, one in zip(prompts, sampling, strict=True)]
        waiting, live = deque(jobs), {job.name: job for job in jobs}
        uses = Counter(key for job in jobs for key in set(job.keys))
        encoded: dict[str, torch.Tensor] = {}
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

    def _job(self, prompt: list[int], images: list[ImageInput], sampling: SamplingParams) -> _Job:
        sampling.validate()
        self._count += 1
        timeline = RequestTimeline(time.monotonic)
        arrays = [rgb_array(image) for image in images]
        keys = [pixel_digest(a.shape[1], a.shape[0], a.data) for a in arrays]
        return _Job(
            name=f"local-{self._count}", prompt=prompt, images=dict(zip(keys, arrays, strict=True)),
            keys=keys, sampling=sampling, timeline=timeline,
            detokenizer=Detokenizer(self.formatter.tokenizer, sampling.stop),
        )  # fmt: skip

    def _feed(self, jobs: list[_Job], encoded: dict[str, torch.Tensor], uses: Counter[str]) -> None:
        """Encode each distinct image of `jobs` once and queue the jobs for prefill."""
        missing = {k: a for job in jobs for k, a in job.images.items() if k not in encoded}
        start = time.monotonic()
        tokens = self.vision.encode(list(missing.values()))
        seconds = time.monotonic() - start
        encoded.update(zip(missing, tokens, strict=True))
        for job in jobs:
            if job.keys:
                job.timeline.add("encode", seconds)
            self.core.add(
                NewSequence(
                    request_id=job.name, attempt=0, prompt_token_ids=job.prompt,
                    image_token_id=self.card.image_token_id, mm_keys=job.keys,
                    sampling=job.sampling,
                ),
                [encoded[key] for key in job.keys],
            )  # fmt: skip
            _release(set(job.keys), encoded, uses)
            job.images.clear()

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


def _release(keys: Iterable[str], encoded: dict[str, torch.Tensor], uses: Counter[str]) -> None:
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
        ),
    )  # fmt: skip


def _as_messages(conversation: Conversation) -> list[dict[str, Any]]:
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    return [dict(message) for message in conversation]


def _place_images(
    messages: list[dict[str, Any]], images: list[ImageInput]
) -> tuple[list[dict[str, Any]], list[ImageInput]]:
    """The messages with bare image parts, and the images in the order of those parts."""
    spare = deque(images)
    placed: list[ImageInput] = []
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = [_bare(part, spare, placed) for part in message["content"]]
    asker = next((m for m in messages if m.get("role") == "user"), None)
    if spare and not placed and asker is not None:
        text = asker.get("content", "")
        parts = text if isinstance(text, list) else [{"type": "text", "text": text}]
        asker["content"] = [{"type": "image"}] * len(spare) + parts
        return messages, list(spare)
    if spare:
        raise InvalidRequestError(f"{len(spare)} images belong to no image part", "images")
    return messages, placed


def _bare(part: Any, spare: deque[ImageInput], placed: list[ImageInput]) -> Any:
    if not isinstance(part, Mapping) or part.get("type") != "image":
        return part
    if "image" in part:
        placed.append(part["image"])
    elif spare:
        placed.append(spare.popleft())
    else:
        raise InvalidRequestError("an image part has no image", "images")
    return {"type": "image"}
