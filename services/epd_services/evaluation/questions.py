"""Questions with known answers: the built-in scenes, or a local directory.

A directory holds `questions.jsonl` and images. Each line is one question:

    {"images": ["a.png"], "question": "What colour is it?", "answer": "red", "type": "colour"}

`images` are paths relative to the directory, in the order of the prompt; `type` may be left out.
Types that begin with "text" or "ocr" are those that read, and gate a method.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from epd.images import ImageInput
from epd_services.cli.terminal import usage_error

if TYPE_CHECKING:
    from epd.errors import ConfigError

__all__ = ["FILE", "SCENES", "Bench", "Question", "load_bench", "matches", "reads_text"]

SCENES = "scenes"
FILE = "questions.jsonl"
MOST_IMAGES = 16


@dataclass(frozen=True, slots=True)
class Question:
    """One question about its `images`, and the answer that counts as right."""

    images: tuple[ImageInput, ...]
    question: str
    answer: str
    type: str


@dataclass(frozen=True, slots=True)
class Bench:
    """Questions under a name; `digest` names their content, for runs that are taken up again."""

    name: str
    digest: str
    questions: list[Question]


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    images: list[str]
    question: str
    answer: str
    type: str = "all"


def load_bench(name: str, *, questions: int, seed: int) -> Bench:
    """The first `questions` held-out scenes of set `seed`, or lines of the directory `name`."""
    if name == SCENES:
        return _scenes(questions, seed)
    directory = Path(name)
    if not directory.is_dir():
        raise _unreadable(name, "It is neither the built-in 'scenes' nor a directory.")
    return _directory(directory, questions)


def matches(text: str, answer: str) -> bool:
    """Whether `text` is `answer`, up to case, white space and a full stop at the end."""
    return _canonical(text) == _canonical(answer)


def reads_text(kind: str) -> bool:
    """Whether questions of this type are about reading."""
    return kind.lower().startswith(("text", "ocr"))


def _canonical(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").casefold()


def _scenes(count: int, seed: int) -> Bench:
    from epd.demo.examples import held_out

    examples = held_out(count, seed)
    told = "\n".join(f"{e.type}|{e.question}|{e.answer}" for e in examples)
    found = [Question(e.images, e.question, e.answer, e.type) for e in examples]
    return Bench(SCENES, hashlib.sha256(told.encode()).hexdigest(), found)


def _directory(directory: Path, count: int) -> Bench:
    try:
        content = (directory / FILE).read_bytes()
    except OSError as error:
        raise _unreadable(str(directory), f"{FILE}: {error.strerror or error}.") from None
    lines = [(n, line) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
    questions = [_question(directory, number, line) for number, line in lines[:count]]
    if not questions:
        raise _unreadable(str(directory), f"{FILE} has no questions.")
    return Bench(directory.resolve().name, hashlib.sha256(content).hexdigest(), questions)


def _question(directory: Path, number: int, line: bytes) -> Question:
    try:
        told = msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unreadable(str(directory), f"{FILE}, line {number}: {error}.") from None
    if not told.question.strip() or not 1 <= len(told.images) <= MOST_IMAGES:
        why = f"{FILE}, line {number}: it needs a question and 1 to {MOST_IMAGES} images."
        raise _unreadable(str(directory), why)
    images = tuple(_image(directory, number, name) for name in told.images)
    return Question(images, told.question, told.answer, told.type)


def _image(directory: Path, number: int, name: str) -> Path:
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()) or not path.is_file():
        why = f"{FILE}, line {number}: {name[:200]!r} is no file in the directory."
        raise _unreadable(str(directory), why)
    return path


def _unreadable(name: str, why: str) -> ConfigError:
    line = '{"images": ["a.png"], "question": "…", "answer": "…", "type": "…"}'
    return usage_error(
        f"Cannot read the benchmark {name[:200]!r}.", why, f"write one question a line: {line}"
    )
