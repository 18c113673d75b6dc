"""The serving benchmark: whole stacks under an open loop, beside transformers in the same run."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from epd.demo import CHECKPOINT
from epd.demo.examples import SINGLE_TYPES, held_out_example
from epd.errors import ConfigError
from epd.roles import format_topology, parse_topology
from epd_services.bench_load import Load, Picture, drive, plan_load, summarise
from epd_services.bench_rows import Row, asked_on, machine, markdown, write_csv
from epd_services.logs import configure_logs
from epd_services.progress import progress
from epd_services.settings import load_settings
from epd_services.stack import Stack, free_port

__all__ = ["Plan", "bench", "plan_bench"]

_WARM_UP = 2
_REFERENCE_SECONDS = 60.0
_COLUMNS = {
    "system": "system", "load": "load", "requests_per_s": "requests/s",
    "ttft_p50_ms": "TTFT p50 ms", "ttft_p99_ms": "TTFT p99 ms",
    "tpot_p50_ms": "TPOT p50 ms", "tpot_p99_ms": "TPOT p99 ms",
    "encode_ms": "encode ms", "transfer_ms": "transfer ms", "prefill_ms": "prefill ms",
    "refused": "refused", "lost": "lost", "duplicate": "duplicate", "wrong": "wrong",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """What is sent: the same loads to every topology. The last pictures warm a stack up."""

    topologies: tuple[str, ...]
    loads: tuple[Load, ...]
    num_pictures: int
    output_tokens: int
    seed: int


def bench(
    *,
    rates: str,
    requests: int,
    output_tokens: int,
    repeat_images: float,
    topologies: str,
    seed: int,
    out: Path | None,
    device: str | None = None,
    dtype: str | None = None,
) -> int:
    """Measure, print a Markdown table, write CSV; the exit code: 1 if one was lost or wrong."""
    plan = plan_bench(rates, requests, output_tokens=output_tokens, repeat=repeat_images,
                      topologies=topologies, seed=seed)  # fmt: skip
    configure_logs("warning", worker="bench")
    begin = time.perf_counter()
    pictures = _draw(plan)
    expected, alone = _reference(plan, pictures)
    rows: list[Row] = []
    for topology in plan.topologies:
        settings, _ = load_settings(
            model=str(CHECKPOINT), topology=topology, host="127.0.0.1", port=free_port(),
            device=device, dtype=dtype,
        )  # fmt: skip
        rows += asyncio.run(_serve(Stack(settings), plan, pictures, expected))
    command = (
        f"epd bench --rates {rates} --requests {requests} --output-tokens {output_tokens} "
        f"--repeat-images {repeat_images} --topologies {topologies} --seed {seed}"
    ) + asked_on(device, dtype)
    rows = [
        *(machine(command=command) | row for row in alone),
        *(machine(command=command, device=settings.device) | row for row in rows),
    ]
    path = out or _default_path()
    write_csv(path, rows)
    _print(rows, path, time.perf_counter() - begin)
    return int(any(row[name] for row in rows for name in ("lost", "duplicate", "wrong")))


def plan_bench(
    rates: str, requests: int, *, output_tokens: int, repeat: float, topologies: str, seed: int
) -> Plan:
    """The loads of one run, a burst last. Raises `ConfigError` for numbers that are none."""
    try:
        numbers = [float(rate) for rate in rates.split(",") if rate.strip()]
    except ValueError:
        numbers = [math.nan]
    if not all(0 < rate < 1e4 for rate in numbers):
        raise ConfigError(
            f"Cannot offer the rates {rates[:64]!r}.\nThey are not positive numbers.\n"
            "epd bench --rates 2,6"
        )
    names = tuple(format_topology(parse_topology(name)) for name in topologies.split(","))
    rng, loads, first = random.Random(seed), [], 0
    for rate in [*numbers, math.inf]:
        load = plan_load(rate, requests, repeat=repeat, first_picture=first, rng=rng)
        first = 1 + max(arrival.picture for arrival in load.arrivals)
        loads.append(load)
    return Plan(names, tuple(loads), first + _WARM_UP, output_tokens, seed)


def _draw(plan: Plan) -> list[Picture]:
    pictures: list[Picture] = []
    with progress("drawing pictures", plan.num_pictures) as advance:
        for number in range(plan.num_pictures):
            advance(number, "")
            kind = SINGLE_TYPES[number % len(SINGLE_TYPES)]
            example = held_out_example(number, plan.seed, kind=kind)
            pictures.append(Picture.of(example.question, example.images[0]))
        advance(plan.num_pictures, "")
    return pictures


def _reference(plan: Plan, pictures: Sequence[Picture]) -> tuple[list[str], list[Row]]:
    """The right answers, and transformers' row per load. Nothing else runs meanwhile."""
    import torch

    from epd_services.bench_reference import expected_answers, generate_sequentially

    torch.set_num_threads(1)
    with progress("answers of epd.LLM", len(pictures)) as advance:
        expected = expected_answers(pictures, plan.output_tokens, advance)
    order = [arrival.picture for load in plan.loads for arrival in load.arrivals]
    with progress("transformers generate", len(order)) as advance:
        outcomes, seconds = generate_sequentially(
            pictures, order, expected, plan.output_tokens, advance, limit=_REFERENCE_SECONDS
        )
    row = summarise(outcomes, seconds, output_tokens=plan.output_tokens)
    gc.collect()
    facts = {
        "system": "transformers",
        "load": f"{len(outcomes)} one after the other",
        "threads": torch.get_num_threads(),
    }
    return expected, [facts | row]


async def _serve(
    stack: Stack, plan: Plan, pictures: Sequence[Picture], expected: Sequence[str]
) -> list[Row]:
    """One row per load, on a freshly started stack with cold caches."""
    rows: list[Row] = []
    topology = stack.settings.topology
    async with stack, stack.client() as client:
        for picture in pictures[-_WARM_UP:]:
            await client.ask(picture.question, [picture.png], max_tokens=plan.output_tokens)
        for load in plan.loads:
            with progress(f"{topology}, {load.name}", len(load.arrivals)) as advance:
                outcomes, seconds = await drive(
                    client, load, pictures, expected,
                    output_tokens=plan.output_tokens, advance=advance,
                )  # fmt: skip
            row = summarise(outcomes, seconds, output_tokens=plan.output_tokens)
            facts = {"system": f"epd {topology}", "load": load.name}
            rows.append({**facts, "threads": stack.settings.threads, **row})
    return rows


def _default_path() -> Path:
    room = Path("docs/bench")
    return room / "cpu.csv" if room.is_dir() else Path("bench.csv")


def _print(rows: Sequence[Row], path: Path, seconds: float) -> None:
    facts = rows[-1]
    print(
        f"\n{facts['device']}, torch {facts['torch']}, transformers {facts['transformers']}, "
        f"{facts['date']} UTC, {seconds:.0f} s in all; built-in model\n"
    )
    print(markdown([_rounded(row) for row in rows], _COLUMNS))
    print(
        "\ntransformers runs batch 1, one request after the other, for a minute at most, with "
        f"{rows[0]['threads']} thread(s), whichever of one and all is\nfaster: its TTFT has no "
        "queue in it. A worker has one thread. TTFT counts from when a request\nwas due. Stages "
        f"are means. Every column: {path}"
    )


def _rounded(row: Row) -> Row:
    return {k: round(v, 2) if isinstance(v, float) and v < 100 else v for k, v in row.items()}
