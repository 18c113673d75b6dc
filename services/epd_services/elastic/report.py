"""`epd simulate`: every trace under every policy, as a table and a CSV file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from epd_services.bench_rows import Row, machine, markdown, write_csv
from epd_services.elastic.controller import Controller, Policy
from epd_services.elastic.load import Balancer
from epd_services.elastic.released_rule import ReleasedRule
from epd_services.elastic.simulation.run import Outcome, simulate
from epd_services.elastic.simulation.service_times import CPU, H200, ServiceTimes
from epd_services.elastic.simulation.traces import (
    Trace,
    burst,
    noise,
    ramp,
    shift,
    square,
)
from epd_services.progress import progress

__all__ = ["Scenario", "compare", "scenarios", "simulate_all", "sustainable_rate"]

WORKERS = 8
START = "5E1P2D"
POLICIES: dict[str, Callable[[], Balancer | None]] = {
    "static": lambda: None,
    "released rule": ReleasedRule,
    "elastic": Controller,
}
_COLUMNS = {
    "times": "service times", "trace": "trace", "policy": "policy", "latency_s": "latency s",
    "latency_gain": "gain", "ttft_s": "TTFT s", "tpot_ms": "TPOT ms", "tpot_gain": "gain",
    "latency_p99_s": "p99 s", "switches": "switches", "most_per_worker": "most by one",
    "switched_back": "back", "last_split": "ends as",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scenario:
    """A trace with service times, from a split of the workers. `name` says what is special."""

    name: str
    times: ServiceTimes
    trace: Trace
    split: str = START


def sustainable_rate(times: ServiceTimes, *, tokens: int = 500, share: float = 0.8) -> float:
    """A `share` of what the best split of eight workers sustains: busy, and possible to serve."""
    return share * max(times.capacity(*split, tokens=tokens) for split in _splits())


def _splits() -> Iterator[tuple[int, int, int]]:
    for encode, prefill in itertools.product(range(1, WORKERS), repeat=2):
        if encode + prefill < WORKERS:
            yield encode, prefill, WORKERS - encode - prefill


def scenarios() -> list[Scenario]:
    """The published shift, at the rate the hardware is made for and at others; then the rest."""
    rate, gpu_rate = round(sustainable_rate(CPU), 1), round(sustainable_rate(H200), 1)
    small = replace(CPU, name="cpu, batch 16", decode_batch=16)
    slow = replace(CPU, name="cpu, switch 3 s", switch_llm=3.0, switch_encoder=3.0)
    calm = 3.0
    return [
        Scenario("shift", CPU, shift(rate)),
        *(Scenario("shift", CPU, shift(other)) for other in (2.0, 3.0, 4.0, 6.0)),
        Scenario("shift", small, shift(round(sustainable_rate(small), 1))),
        Scenario("shift", slow, shift(rate)),
        Scenario("shift", H200, shift(gpu_rate)),
        Scenario("shift", H200, shift(gpu_rate, short=100, long=900)),
        *(Scenario("square", CPU, square(calm, half=half, waves=3)) for half in (5.0, 20.0, 60.0)),
        Scenario("ramp", CPU, ramp(calm)),
        Scenario("burst", CPU, burst(calm)),
        Scenario("noise", CPU, noise(calm)),
    ]


def compare(scenario: Scenario) -> list[Row]:
    """A row per policy; the last is the static split that hindsight would have chosen."""
    outcomes = {
        name: simulate(scenario.trace, scenario.split, times=scenario.times, balancer=make())
        for name, make in POLICIES.items()
    }
    static = outcomes["static"]
    outcomes["best static split"] = _best(scenario)
    return [_row(scenario, name, outcome, static) for name, outcome in outcomes.items()]


def _best(scenario: Scenario) -> Outcome:
    names = (f"{e}E{p}P{d}D" for e, p, d in _splits())
    outcomes = (simulate(scenario.trace, name, times=scenario.times) for name in names)
    return min(outcomes, key=lambda outcome: outcome.latency)


def _row(scenario: Scenario, policy: str, outcome: Outcome, static: Outcome) -> Row:
    return {
        "scenario": scenario.name,
        "times": scenario.times.name,
        "trace": scenario.trace.name,
        "shifts": scenario.trace.shifts,
        "requests": len(outcome.jobs),
        "split": scenario.split,
        "policy": policy,
        "latency_s": outcome.latency,
        "latency_gain": static.latency / outcome.latency,
        "ttft_s": outcome.ttft,
        "tpot_ms": 1000 * outcome.tpot,
        "tpot_gain": static.tpot / outcome.tpot,
        "latency_p99_s": outcome.latency_p99,
        "switches": len(outcome.switches),
        "most_per_worker": outcome.most_switches,
        "switched_back": outcome.switched_back(Policy().cool_down),
        "recomputed": outcome.recomputed,
        "last_split": outcome.last_split,
        "why": " | ".join(f"{at:.1f} s: {reason}" for at, reason in outcome.reasons[:3]),
    }


def simulate_all(out: Path | None) -> int:
    """Run every scenario, print the table, write the rows; the exit code."""
    facts = machine(command="epd simulate")
    rows: list[Row] = []
    todo = scenarios()
    with progress("simulating", len(todo)) as advance:
        for number, scenario in enumerate(todo):
            advance(number, f"{scenario.times.name}, {scenario.trace.name}")
            rows += [facts | row for row in compare(scenario)]
        advance(len(todo), "done")
    room = Path("docs/bench")
    path = out or (room / "elastic.csv" if room.is_dir() else Path("elastic.csv"))
    write_csv(path, rows)
    print(f"\n{WORKERS} simulated workers, starting as {START}; a gain of 2 is half the time\n")
    print(markdown(rows, _COLUMNS))
    print(
        f'\n"back": a worker returned to its last stage within {Policy().cool_down:g} s. The best '
        f"static split knows the\ntrace beforehand. Every column: {path}"
    )
    return 0
