"""What the served answers are held against: `epd.LLM` for the text, transformers for the time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epd.demo import CHECKPOINT
from epd.engine import LLM
from epd.request import SamplingParams
from epd_services.bench_load import Outcome, Picture
from epd_services.client import Reply

if TYPE_CHECKING:
    from epd_services.progress import Advance

__all__ = ["expected_answers", "generate_sequentially"]


@torch.inference_mode()
def expected_answers(
    pictures: Sequence[Picture], output_tokens: int, advance: Advance, *, model: Path = CHECKPOINT
) -> list[str]:
    """The greedy answer of `epd.LLM` to each picture's question, one at a time."""
    llm = LLM(model)
    sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    answers: list[str] = []
    for picture in pictures:
        advance(len(answers), "")
        completion = llm.chat(picture.question, images=[picture.image], sampling=sampling)
        answers.append(completion.text)
    advance(len(pictures), "")
    return answers


@torch.inference_mode()
def generate_sequentially(
    pictures: Sequence[Picture],
    order: Sequence[int],
    expected: Sequence[str],
    output_tokens: int,
    advance: Advance,
    *,
    limit: float,
    model: Path = CHECKPOINT,
) -> tuple[list[Outcome], float]:
    """transformers' own `generate` on the pictures in `order`: batch 1, one after the other.

    It gets as many threads as cores, or one, whichever answers two warm-up requests sooner, and
    leaves torch with that many. Stops after `limit` seconds. Outcomes as of a served load, so that
    one table holds both; nothing waits in a queue here.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    processor: Any = AutoProcessor.from_pretrained(model)
    network: Any = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    # as with ignore_eos: every answer has all its tokens
    network.generation_config.eos_token_id = None
    _choose_threads(lambda: _generate(network, processor, pictures[order[0]], output_tokens))
    outcomes: list[Outcome] = []
    begin = time.perf_counter()
    for number in order:
        advance(len(outcomes), "")
        reply = _generate(network, processor, pictures[number], output_tokens)
        outcomes.append(Outcome(reply, 0.0, reply.text == expected[number]))
        if time.perf_counter() - begin > limit:
            break
    advance(len(outcomes), "stopped at the limit" if len(outcomes) < len(order) else "")
    return outcomes, time.perf_counter() - begin


def _choose_threads(request: Callable[[], Reply]) -> None:
    """Threads that spin against busy neighbours are slower than one: measure, then choose."""
    cores = len(os.sched_getaffinity(0))
    seconds: dict[int, float] = {}
    for threads in sorted({1, cores}):
        torch.set_num_threads(threads)
        seconds[threads] = request().total + request().total
    torch.set_num_threads(min(seconds, key=lambda threads: seconds[threads]))


def _generate(network: Any, processor: Any, picture: Picture, output_tokens: int) -> Reply:
    parts = [{"type": "image"}, {"type": "text", "text": picture.question}]
    stamps = _Stamps()
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    inputs = processor(images=[picture.image], text=prompt, return_tensors="pt")
    output = network.generate(
        **inputs, max_new_tokens=output_tokens, do_sample=False, streamer=stamps,
        pad_token_id=network.config.text_config.pad_token_id or 0,
    )  # fmt: skip
    ids = output[0, inputs["input_ids"].shape[1] :]
    first, last = stamps.times[0], stamps.times[-1]
    return Reply(
        status=200, finish_reason="length", text=processor.decode(ids, skip_special_tokens=True),
        usage={"completion_tokens": len(ids)}, ttft=first, total=last,
        tpot=(last - first) / (len(ids) - 1) if len(ids) > 1 else None,
    )  # fmt: skip


class _Stamps:
    """A streamer that notes when each token came, in seconds since it was made."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._begin = time.perf_counter()
        self._prompt_seen = False

    def put(self, _: torch.Tensor) -> None:
        """Called with the prompt, then with every token."""
        if self._prompt_seen:
            self.times.append(time.perf_counter() - self._begin)
        self._prompt_seen = True

    def end(self) -> None:
        """Called at the end."""
