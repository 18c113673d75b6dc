"""What the stacks of real processes are asked, and what must come back."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from epd import LLM, SamplingParams
from epd.models.tiny import write_tiny_llava


class Questions:
    """One question about six pictures, of which number n asks about picture n modulo 6."""

    text = "what is it"
    tokens = 400

    def __init__(self, model: Path) -> None:
        self.model = str(model)
        rng = np.random.default_rng(11)
        self._pictures = [
            Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)) for _ in range(6)
        ]
        llm = LLM(self.model)
        sampling = SamplingParams(max_tokens=self.tokens, ignore_eos=True)
        self._answers = [
            llm.chat(self.text, images=[picture], sampling=sampling).text
            for picture in self._pictures
        ]
        self._salts = itertools.count()

    def body(self, stack: Any, number: int) -> dict[str, Any]:
        """Question `number`, its image new to every cache."""
        body: dict[str, Any] = stack.body(
            [self._pictures[number % 6]], self.text, max_tokens=self.tokens, ignore_eos=True,
            cache_salt=f"salt {next(self._salts)}",
        )  # fmt: skip
        return body

    def bodies(self, stack: Any, count: int) -> list[dict[str, Any]]:
        """The first `count` questions."""
        return [self.body(stack, number) for number in range(count)]

    def check(self, replies: list[Any]) -> None:
        """The answers to the first questions are whole, those of one process, and came once."""
        for number, reply in enumerate(replies):
            self.check_one(reply, number)

    def check_one(self, reply: Any, number: int) -> None:
        """The same of the answer to question `number`."""
        assert (reply.status, reply.error) == (200, None)
        assert reply.text == self._answers[number % 6]
        assert reply.finish_reason == "length"
        assert reply.usage["completion_tokens"] == self.tokens


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Questions:
    """One for all: nothing in it changes but the salts."""
    return Questions(write_tiny_llava(tmp_path_factory.mktemp("tiny"), seed=3))
