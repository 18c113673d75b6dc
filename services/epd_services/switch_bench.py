"""Role switches under load: an open loop of questions while workers change their roles at random,
every answer held against the undisturbed one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epd.demo import CHECKPOINT
from epd.demo.examples import SINGLE_TYPES, held_out_example
from epd.errors import ConfigError
from epd_services.admin.client import AdminClient, RefusedError, open_client
from epd_services.bench_load import Outcome, Picture, summarise
from epd_services.bench_rows import Row, asked_on, machine, markdown, write_csv
from epd_services.client import ChatClient
from epd_services.gateway.switches import PHASES
from epd_services.logs import configure_logs
from epd_services.progress import progress
from epd_services.settings import load_settings
from epd_services.stack import Stack, free_port

__all__ = ["OpenLoop", "choose_switch", "switch_bench"]

_ASKED_RATE = 20.0
_SUSTAINED = 0.6
_PICTURES = 48
_REMEMBERED = 32
_PROBE = 48
_MOST_IN_FLIGHT = 192
_PATIENCE = 10.0
_ROLES = ("E", "P", "D", "EP", "ED", "PD", "EPD")
_LOAD_COLUMNS = {
    "under": "load", "requests": "requests", "requests_per_s": "answers/s", "lost": "lost",
    "duplicate": "duplicate", "wrong": "wrong", "refused": "errors", "retries": "retries",
    "moved": "moved", "ttft_p50_ms": "TTFT p50 ms", "ttft_p99_ms": "TTFT p99 ms",
    "tpot_p50_ms": "TPOT p50 ms", "tpot_p99_ms": "TPOT p99 ms",
}  # fmt: skip
_SWITCH_COLUMNS = {
    "under": "load", "number": "#", "worker": "worker", "change": "switch", "state": "state",
    **{f"{name}_s": f"{name} s" for name in PHASES}, "moved": "moved",
}  # fmt: skip


def switch_bench(
    count: int,
    *,
    rates: str | None,
    topology: str,
    output_tokens: int,
    repeat_images: float,
    seed: int,
    out: Path | None,
    device: str | None = None,
    dtype: str | None = None,
) -> int:
    """Do `count` switches under each load, print tables, write CSV; the exit code: 1 if an answer
    was lost, doubled, wrong or an error, or a switch did not happen.

    Without `rates`: 20 requests a second, and a rate that this machine sustains.
    """
    configure_logs("error", worker="bench")
    began = time.perf_counter()
    pictures, expected = _questions(seed, output_tokens)
    settings, _ = load_settings(
        model=str(CHECKPOINT), topology=topology, host="127.0.0.1", port=free_port(),
        device=device, dtype=dtype, request_seconds=600.0,
    )  # fmt: skip
    plan = _Plan(count, rates, output_tokens, repeat_images, seed, pictures, expected)
    loads, switches = asyncio.run(_measure(Stack(settings), plan))
    command = (
        f"epd bench --switches {count} --topologies {topology} --output-tokens {output_tokens} "
        f"--repeat-images {repeat_images} --seed {seed}" + (f" --rates {rates}" if rates else "")
    ) + asked_on(device, dtype)
    facts = machine(command=command, device=settings.device)
    path = out or _default_path()
    write_csv(path, [facts | {"row": "load"} | row for row in loads]
              + [facts | {"row": "switch"} | row for row in switches])  # fmt: skip
    _print(loads, switches, path, facts, time.perf_counter() - began)
    return int(_bad(loads, switches))


@dataclass(frozen=True, slots=True)
class _Plan:
    count: int
    rates: str | None
    output_tokens: int
    repeat: float
    seed: int
    pictures: Sequence[Picture]
    expected: Sequence[str]


def _questions(seed: int, output_tokens: int) -> tuple[list[Picture], list[str]]:
    """Pictures with questions, and the greedy answer of `epd.LLM` to each."""
    import torch

    from epd_services.bench_reference import expected_answers

    torch.set_num_threads(1)
    kinds = itertools.cycle(SINGLE_TYPES)
    examples = [held_out_example(n, seed, kind=next(kinds)) for n in range(_PICTURES)]
    pictures = [Picture.of(example.question, example.images[0]) for example in examples]
    with progress("answers of epd.LLM", len(pictures)) as advance:
        return pictures, expected_answers(pictures, output_tokens, advance)


def parse_rates(text: str) -> list[float]:
    """The rates of `--rates`. Raises `ConfigError` for what is no positive number."""
    try:
        rates = [float(rate) for rate in text.split(",") if rate.strip()]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1e4 for rate in rates):
        raise ConfigError(
            f"Cannot offer the rates {text[:64]!r}.\nThey are not positive numbers.\n"
            "epd bench --switches 20 --rates 20,4"
        )
    return rates


async def _measure(stack: Stack, plan: _Plan) -> tuple[list[Row], list[Row]]:
    rates = parse_rates(plan.rates) if plan.rates else []
    loads: list[Row] = []
    switches: list[Row] = []
    async with stack, stack.client() as client:
        admin = open_client(None, None, stack.run_dir)
        with admin:
            capacity = await _capacity(client, plan)
            loads.append({"under": f"burst of {_PROBE}"} | capacity)
            sustained = max(0.5, round(2 * _SUSTAINED * capacity["requests_per_s"]) / 2)
            for rate in rates or [_ASKED_RATE, sustained]:
                load, done = await _under_load(client, admin, plan, rate)
                loads.append(load)
                switches += done
    return loads, switches


async def _capacity(client: ChatClient, plan: _Plan) -> Row:
    """What the undisturbed services answer when everything is asked at once."""
    loop = OpenLoop(client, plan.pictures, plan.expected, plan.output_tokens, plan.repeat,
                    random.Random(plan.seed), "probe")  # fmt: skip
    await loop.warm_up()
    begin = time.perf_counter()
    loop.send(_PROBE)
    return await loop.finish(begin)


async def _under_load(
    client: ChatClient, admin: AdminClient, plan: _Plan, rate: float
) -> tuple[Row, list[Row]]:
    """One load with `plan.count` switches in it."""
    rng = random.Random(plan.seed)
    before = (await asyncio.to_thread(admin.status))["counters"]
    loop = OpenLoop(client, plan.pictures, plan.expected, plan.output_tokens, plan.repeat, rng,
                    f"{rate:g}")  # fmt: skip
    begin = time.perf_counter()
    arriving = asyncio.create_task(loop.arrive(rate))
    done: list[Row] = []
    try:
        with progress(f"switches at {rate:g}/s", plan.count) as advance:
            for number in range(1, plan.count + 1):
                await asyncio.sleep(rng.uniform(0.5, 1.0))
                record = await asyncio.to_thread(_one_switch, admin, rng)
                done.append(_switch_row(f"{rate:g}/s", number, record))
                advance(number, "")
        await asyncio.sleep(1.0)
    finally:
        arriving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await arriving
    with progress(f"the last answers at {rate:g}/s", 1) as advance:
        row = await loop.finish(begin)
        advance(1, "")
    after = (await asyncio.to_thread(admin.status))["counters"]
    grown = {name: after.get(name, 0) - before.get(name, 0) for name in ("retries", "moved")}
    return {"under": f"{rate:g}/s"} | row | grown, done


class OpenLoop:
    """Requests that arrive whether or not the earlier ones are answered.

    A share `repeat` of them asks about a picture of an earlier request. There are few pictures;
    each round over them has a cache salt of its own, which makes them new to every cache.
    """

    def __init__(
        self,
        client: ChatClient,
        pictures: Sequence[Picture],
        expected: Sequence[str],
        output_tokens: int,
        repeat: float,
        rng: random.Random,
        name: str,
    ) -> None:
        self._client = client
        self._pictures = pictures
        self._expected = expected
        self._tokens = output_tokens
        self._repeat = repeat
        self._rng = rng
        self._name = name
        self._fresh = itertools.count()
        self._seen: list[int] = []
        self._sent: list[asyncio.Task[Outcome]] = []

    async def warm_up(self) -> None:
        """Two answers that count nowhere."""
        for number in range(2):
            await self._one(number, 0.0)

    def choose(self) -> int:
        """The next picture: its number, counting on over the rounds."""
        if self._seen and self._rng.random() < self._repeat:
            return self._rng.choice(self._seen[-_REMEMBERED:])
        self._seen.append(next(self._fresh))
        return self._seen[-1]

    def send(self, count: int, due: float | None = None) -> None:
        """Send requests now; their latency counts from `due`."""
        moment = time.perf_counter() if due is None else due
        for _ in range(count):
            self._sent.append(asyncio.create_task(self._one(self.choose(), moment)))

    async def arrive(self, rate: float) -> None:
        """Send `rate` requests a second, at random times, until cancelled.

        Beyond what the services take, the client holds back: they would refuse the excess.
        """
        due = time.perf_counter()
        while True:
            due += self._rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            while sum(not task.done() for task in self._sent) >= _MOST_IN_FLIGHT:
                await asyncio.sleep(0.01)
                due = time.perf_counter()
            self.send(1, due)

    async def _one(self, number: int, due: float) -> Outcome:
        late = max(0.0, time.perf_counter() - due) if due else 0.0
        lap, index = divmod(number, len(self._pictures))
        picture = self._pictures[index]
        reply = await self._client.ask(
            picture.question, [picture.png], max_tokens=self._tokens, ignore_eos=True,
            temperature=0, cache_salt=f"{self._name}-{lap}",
        )  # fmt: skip
        return Outcome(reply, late, reply.complete and reply.text == self._expected[index])

    async def finish(self, begin: float) -> Row:
        """The columns of a load whose every request has ended."""
        outcomes = list(await asyncio.gather(*self._sent))
        seconds = time.perf_counter() - begin
        return summarise(outcomes, seconds, output_tokens=self._tokens)


def choose_switch(admin: AdminClient, rng: random.Random) -> tuple[str, str] | None:
    """A random worker and a random other role for it that would not be refused."""
    workers = {w["name"]: w["stages"] for w in admin.status()["workers"]}
    wishes = [(n, role) for n, stages in workers.items() for role in _ROLES if role != stages]
    rng.shuffle(wishes)
    return next((w for w in wishes if not admin.preview(*w, force=False)["refused"]), None)


def _one_switch(admin: AdminClient, rng: random.Random) -> dict[str, Any]:
    """The record of a random switch when it is over."""
    until = time.monotonic() + _PATIENCE
    while (wish := choose_switch(admin, rng)) is None:
        if time.monotonic() > until:
            roles = [f"{w['name']} {w['stages']} {w['state']}" for w in admin.status()["workers"]]
            raise ConfigError(f"No switch is possible.\nThe workers: {', '.join(roles)}.\n"
                              "epd bench --switches 20 --topologies 2E2P2D")  # fmt: skip
        time.sleep(0.1)
    worker, stages = wish
    try:
        record = admin.switch(worker, stages, drain_seconds=10.0)
    except RefusedError as error:
        return {"worker": worker, "old": "", "new": stages, "state": error.reason, "phases": {},
                "moved": 0, "error": str(error)}  # fmt: skip
    while not record["final"]:
        time.sleep(0.05)
        record = admin.get(record["switch_id"])
    return record


def _switch_row(load: str, number: int, record: dict[str, Any]) -> Row:
    phases = {f"{name}_s": record["phases"].get(name, "") for name in PHASES}
    return {
        "under": load, "number": number, "worker": record["worker"],
        "change": f"{record['old']} → {record['new']}", "state": record["state"], **phases,
        "moved": record["moved"], "error": record["error"] or "",
    }  # fmt: skip


def _bad(loads: Sequence[Row], switches: Sequence[Row]) -> bool:
    counts = ("lost", "duplicate", "wrong", "refused")
    return any(row[name] for row in loads for name in counts) or any(
        row["state"] != "done" for row in switches
    )


def _beyond_drain(row: Row) -> float:
    return float(row["total_s"] or 0.0) - float(row["drain_s"] or 0.0)


def _default_path() -> Path:
    room = Path("docs/bench")
    return room / "switches.csv" if room.is_dir() else Path("switches.csv")


def _print(
    loads: Sequence[Row], switches: Sequence[Row], path: Path, facts: Row, seconds: float
) -> None:
    print(f"\n{facts['device']}, torch {facts['torch']}, {facts['date']} UTC, {seconds:.0f} s\n")
    print(markdown([_rounded(row) for row in switches], _SWITCH_COLUMNS))
    print()
    print(markdown([_rounded(row) for row in loads], _LOAD_COLUMNS))
    capacity = loads[0]["requests_per_s"]
    print(f"\nUndisturbed, this machine answers {capacity:.1f} of these requests a second: "
          f"{_ASKED_RATE:g} a second is {_ASKED_RATE / capacity:.1f} times that.")  # fmt: skip
    done = [row for row in switches if row["state"] == "done"]
    worst = max((_beyond_drain(row) for row in done), default=0.0)
    print(f"{len(done)} of {len(switches)} switches done, at most {worst:.3f} s beyond the drain. "
          f"Every column: {path}")  # fmt: skip


def _rounded(row: Row) -> Row:
    return {k: round(v, 3) if isinstance(v, float) and v < 100 else v for k, v in row.items()}
