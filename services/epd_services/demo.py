"""The demonstration: the real stack, pictures it has never seen, and how many answers are right."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epd.demo import CHECKPOINT
from epd.demo.examples import MULTI_TYPES, SINGLE_TYPES, held_out_example
from epd.roles import parse_topology
from epd_services.bench_rows import machine, percentile
from epd_services.cli.terminal import note, show_table, table
from epd_services.logs import configure_logs
from epd_services.progress import progress
from epd_services.settings import load_settings
from epd_services.stack import Stack, free_port

if TYPE_CHECKING:
    from epd_services.client import ChatClient, Reply

__all__ = ["Question", "Result", "ask_all", "demo", "draw_questions", "passed", "write_report"]

PASS_SHARE = 7 / 8
_FEW = 24
_STAGES = ("encode", "transfer", "prefill", "ttft", "total")


@dataclass(frozen=True, slots=True)
class Question:
    """A question about PNG files, and the answer a person would give."""

    type: str
    text: str
    expected: str
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How one question went; `timings` are seconds per stage."""

    type: str
    question: str
    answer: str
    expected: str
    right: bool
    files: list[str]
    timings: dict[str, float]


def demo(
    *,
    questions: int,
    topology: str,
    out: Path,
    seed: int,
    json_file: Path | None,
    multi: bool,
    concurrency: int | None,
) -> int:
    """Run and print the demonstration; the exit code: 0 if at least 7 of 8 answers are right."""
    settings, _ = load_settings(
        model=str(CHECKPOINT), topology=topology, host="127.0.0.1", port=free_port()
    )
    parse_topology(topology)
    configure_logs("warning", worker="demo")
    stack = Stack(settings)
    asked = draw_questions(questions, seed, out=out, multi=multi)
    in_flight = concurrency or (1 if questions <= _FEW else 8)
    results, seconds = asyncio.run(_run(stack, asked, in_flight))
    if questions <= _FEW:
        _show_each(results, topology)
    else:
        _show_types(results)
    right = sum(result.right for result in results)
    print(
        f"{right} of {questions} right ({right / questions:.1%}), served as {topology}, "
        f"{in_flight} in flight, {questions / seconds:.1f} questions/s"
    )
    print(f"The pictures are in {out}/")
    if json_file is not None:
        command = f"epd demo --questions {questions} --seed {seed} --topology {topology}"
        facts = machine(command=command + (" --multi" if multi else ""), device=settings.device)
        write_report(json_file, results, **facts, pruning=settings.pruning, in_flight=in_flight,
               seconds=round(seconds, 3))  # fmt: skip
    return 0 if passed(results) else 1


def passed(results: Sequence[Result]) -> bool:
    """Whether at least 7 of 8 answers are right."""
    return sum(result.right for result in results) >= PASS_SHARE * len(results)


def draw_questions(count: int, seed: int, *, out: Path, multi: bool = False) -> list[Question]:
    """`count` held-out questions that take turns through the types; their PNGs are put in `out`."""
    types = SINGLE_TYPES
    if multi:
        pairs = zip_longest(SINGLE_TYPES, MULTI_TYPES)
        types = tuple(kind for kind in chain.from_iterable(pairs) if kind is not None)
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[Question] = []
    with progress("drawing pictures", count) as advance:
        for number in range(count):
            advance(number, "")
            example = held_out_example(number, seed, kind=types[number % len(types)])
            files = []
            for place, image in enumerate(example.images):
                letter = "abc"[place] if len(example.images) > 1 else ""
                files.append(out / f"{number + 1:03d}{letter}-{example.type}.png")
                image.save(files[-1])
            drawn.append(Question(example.type, example.question, example.answer, tuple(files)))
        advance(count, "")
    return drawn


async def _run(
    stack: Stack, questions: Sequence[Question], in_flight: int
) -> tuple[list[Result], float]:
    async with stack, stack.client() as client:
        begin = time.perf_counter()
        results = await ask_all(client, questions, in_flight)
        return results, time.perf_counter() - begin


async def ask_all(
    client: ChatClient, questions: Sequence[Question], in_flight: int
) -> list[Result]:
    """The result of every question, in order; at most `in_flight` are under way at a time."""
    gate, done = asyncio.Semaphore(in_flight), 0
    with progress("asking", len(questions)) as advance:

        async def one(question: Question) -> Result:
            nonlocal done
            async with gate:
                result = await _ask(client, question)
            done += 1
            advance(done, "")
            return result

        return list(await asyncio.gather(*(one(question) for question in questions)))


async def _ask(client: ChatClient, question: Question) -> Result:
    images = await asyncio.to_thread(lambda: [path.read_bytes() for path in question.files])
    reply = await client.ask(question.text, images, max_tokens=64, temperature=0)
    answer = reply.text.strip() if reply.complete else f"[{reply.error or 'no answer'}]"
    return Result(
        type=question.type, question=question.text, answer=answer, expected=question.expected,
        right=reply.complete and answer == question.expected,
        files=[path.name for path in question.files], timings=_timings(reply),
    )  # fmt: skip


def _timings(reply: Reply) -> dict[str, float]:
    """Seconds per stage as the service measured them; the total is what this client saw."""
    return {**reply.timings, "total": reply.total}


def _show_each(results: Sequence[Result], topology: str) -> None:
    rows = [
        (
            result.type, result.question, result.answer, result.expected,
            "yes" if result.right else "NO",
            *(_milliseconds(result.timings.get(stage)) for stage in _STAGES),
        )
        for result in results
    ]  # fmt: skip
    columns = ("type", "question", "answer", "expected", "ok",
               "encode", "transfer", "prefill", "first token", "total")  # fmt: skip
    show_table(table(f"{topology}, times in milliseconds", columns, rows))


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f}"


def _show_types(results: Sequence[Result]) -> None:
    kinds = dict.fromkeys(result.type for result in results)
    rows = []
    for kind in kinds:
        of_kind = [result for result in results if result.type == kind]
        right = sum(result.right for result in of_kind)
        rows.append((kind, len(of_kind), right, f"{right / len(of_kind):.1%}"))
    show_table(table("", ("type", "asked", "right", "share"), rows))
    for result in [result for result in results if not result.right][:20]:
        note(f"wrong: {result.files[0]}: {result.question} -> {result.answer!r}, "
             f"expected {result.expected!r}")  # fmt: skip
    first = [result.timings["ttft"] for result in results if "ttft" in result.timings]
    print(
        f"first token after {1000 * percentile(first, 50):.0f} ms (median), "
        f"{1000 * percentile(first, 99):.0f} ms (99th percentile)"
    )


def write_report(path: Path, results: Sequence[Result], **facts: Any) -> None:
    """Write a run as JSON: `facts`, the score, each type, each answer (of many, the wrong ones)."""
    right = sum(result.right for result in results)
    types: dict[str, dict[str, int]] = {}
    for result in results:
        entry = types.setdefault(result.type, {"asked": 0, "right": 0})
        entry["asked"] += 1
        entry["right"] += result.right
    told = results if len(results) <= _FEW else [r for r in results if not r.right]
    report = {
        **facts, "questions": len(results), "right": right, "accuracy": right / len(results),
        "types": types, "answers": [asdict(result) for result in told],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
