"""The shift on real workers of this machine: whole stacks, with and without the controller.

    python -m epd_services.elastic.experiment [OUT.csv]

The workers share this machine's cores: what moving them can gain is bounded by the cores that the
static split leaves idle. Both kinds of run take turns, so that whatever else the machine does
meets both.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from epd.demo import CHECKPOINT
from epd.demo.examples import SINGLE_TYPES, held_out_example
from epd_services.admin.client import open_client
from epd_services.bench_load import Picture
from epd_services.bench_rows import Row, machine, markdown, percentile, write_csv
from epd_services.client import ChatClient, Reply
from epd_services.logs import configure_logs
from epd_services.progress import progress
from epd_services.settings import load_settings
from epd_services.stack import Stack, free_port

__all__ = ["Answer", "Plan", "main", "run_once", "summary"]

_COLUMNS = {
    "policy": "policy", "run": "run", "latency_s": "latency s", "ttft_s": "TTFT s",
    "tpot_ms": "TPOT ms", "latency_p99_s": "p99 s", "seconds": "all answered after s",
    "lost": "lost", "wrong": "wrong", "errors": "errors", "switches": "switches",
    "most_per_worker": "most by one", "last_split": "ends as", "load_average": "load average",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The scaled shift: `short` requests of `few` tokens, then `long` of `many`, at `rate`/s."""

    topology: str = "3E1P1D"
    rate: float = 3.0
    short: int = 8
    few: int = 15
    long: int = 60
    many: int = 200
    repeats: int = 3
    pictures: int = 17

    def asks(self) -> list[int]:
        """Tokens of each request, in order."""
        return [self.few] * self.short + [self.many] * self.long


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply, how late it was asked for, and whether it is the right one."""

    reply: Reply
    late: float
    right: bool


def run_once(plan: Plan, pictures: Sequence[Picture], expected: Sequence[str], *,
             elastic: bool) -> Row:  # fmt: skip
    """The row of one run on a stack of its own."""
    settings, _ = load_settings(
        model=str(CHECKPOINT), topology=plan.topology, host="127.0.0.1", port=free_port(),
        elastic=elastic, max_inflight=1024, request_seconds=600.0,
    )  # fmt: skip
    return asyncio.run(_run(Stack(settings), plan, pictures, expected))


async def _run(
    stack: Stack, plan: Plan, pictures: Sequence[Picture], expected: Sequence[str]
) -> Row:
    async with stack, stack.client() as client:
        for picture in pictures[:2]:
            await client.ask(picture.question, [picture.png], max_tokens=8, cache_salt="warm")
        begin = time.perf_counter()
        answers = await asyncio.gather(
            *(
                _ask(client, begin + n / plan.rate, n, tokens, pictures, expected, whole=plan.many)
                for n, tokens in enumerate(plan.asks())
            )
        )
        seconds = time.perf_counter() - begin
        with open_client(None, None, stack.run_dir) as admin:
            history = await asyncio.to_thread(admin.history)
            status = await asyncio.to_thread(admin.status)
    return summary(answers, seconds, history=history, topology=status["topology"])


async def _ask(
    client: ChatClient, due: float, number: int, tokens: int, pictures: Sequence[Picture],
    expected: Sequence[str], *, whole: int,
) -> Answer:  # fmt: skip
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    late = time.perf_counter() - due
    lap, index = divmod(number, len(pictures))
    reply = await client.ask(
        pictures[index].question, [pictures[index].png], max_tokens=tokens, ignore_eos=True,
        temperature=0, cache_salt=f"lap-{lap}",
    )  # fmt: skip
    # an answer of fewer tokens is the beginning of the expected one, but for half a character
    text = expected[index] if tokens == whole else expected[index][: len(reply.text.rstrip())]
    right = reply.text == text if tokens == whole else reply.text.rstrip() == text
    return Answer(reply, late, reply.complete and right)


def summary(
    answers: Sequence[Answer], seconds: float, *, history: Sequence[dict[str, Any]], topology: str
) -> Row:
    """Means over the answers that came, what went wrong, and what was switched."""
    whole = [a for a in answers if a.reply.complete]
    done = [record for record in history if record["state"] == "done"]
    per_worker = Counter(record["worker"] for record in done)
    return {
        "requests": len(answers),
        "latency_s": fmean(a.late + a.reply.total for a in whole),
        "ttft_s": fmean(a.late + (a.reply.ttft or 0.0) for a in whole),
        "tpot_ms": 1000 * fmean(a.reply.tpot for a in whole if a.reply.tpot is not None),
        "latency_p99_s": percentile((a.late + a.reply.total for a in whole), 99),
        "seconds": seconds,
        "lost": sum(not a.reply.terminal for a in answers),
        "wrong": sum(a.reply.complete and not a.right for a in answers),
        "errors": sum(a.reply.code is not None for a in answers),
        "switches": len(done),
        "most_per_worker": max(per_worker.values(), default=0),
        "switch_seconds": median([r["phases"]["total"] for r in done]) if done else "",
        "last_split": topology,
        "load_average": f"{os.getloadavg()[0]:.1f}",
        "why": " | ".join(dict.fromkeys(record["reason"] for record in history))[:600],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; the exit code: 1 if an answer was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, nargs="?", default=Path("docs/bench/elastic_real.csv"))
    for name, kind in (("rate", float), ("long", int), ("many", int), ("repeats", int)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(Plan(), name))
    parser.add_argument("--topology", default=Plan().topology)
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    plan = Plan(**given)
    configure_logs("error", worker="bench")
    pictures, expected = _questions(plan)
    rows = _alternate(plan, pictures, expected)
    facts = machine(
        command="python -m epd_services.elastic.experiment "
        + " ".join(f"--{name} {value}" for name, value in given.items())
    )
    write_csv(out, [facts | row for row in rows])
    _print(rows, plan, out)
    return int(any(row["lost"] or row["wrong"] for row in rows))


def _questions(plan: Plan) -> tuple[list[Picture], list[str]]:
    import torch

    from epd_services.bench_reference import expected_answers

    torch.set_num_threads(1)
    kinds = itertools.cycle(SINGLE_TYPES)
    examples = [held_out_example(n, 0, kind=next(kinds)) for n in range(plan.pictures)]
    pictures = [Picture.of(example.question, example.images[0]) for example in examples]
    with progress("answers of epd.LLM", len(pictures)) as advance:
        return pictures, expected_answers(pictures, plan.many, advance)


def _alternate(plan: Plan, pictures: Sequence[Picture], expected: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    with progress("the shift on real workers", 2 * plan.repeats) as advance:
        for run in range(plan.repeats):
            for policy in ("static", "elastic"):
                advance(len(rows), policy)
                row = run_once(plan, pictures, expected, elastic=policy == "elastic")
                shape = {"topology": plan.topology, "rate": plan.rate}
                rows.append({"policy": policy, "run": run + 1, **shape, **row})
        advance(len(rows), "done")
    return rows


def _print(rows: Sequence[Row], plan: Plan, out: Path) -> None:
    print(f"\n{plan.short} requests of {plan.few} tokens, then {plan.long} of {plan.many}, "
          f"{plan.rate:g} a second, from {plan.topology}, {os.cpu_count()} cores\n")  # fmt: skip
    print(markdown(rows, _COLUMNS))
    for name in ("latency_s", "tpot_ms", "ttft_s"):
        static, elastic = (
            median(row[name] for row in rows if row["policy"] == policy)
            for policy in ("static", "elastic")
        )
        print(f"{name}: median {static:.4g} static, {elastic:.4g} elastic: {static / elastic:.2f}x")
    print(f"Every column: {out}")


if __name__ == "__main__":
    sys.exit(main())
