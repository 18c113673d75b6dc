"""The simulator against closed forms: queues, processor sharing, Little's law, conservation."""

import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from epd.roles import Stage
from epd_services.elastic.load import Decision, Move, Snapshot
from epd_services.elastic.measure import fitted
from epd_services.elastic.report import sustainable_rate
from epd_services.elastic.simulation.events import EventLoop
from epd_services.elastic.simulation.run import simulate
from epd_services.elastic.simulation.service_times import CPU, H200, ServiceTimes
from epd_services.elastic.simulation.traces import Arrival, Trace, noise, shift, square

FREE = ServiceTimes(
    name="free", encode_base=0, encode_per_image=0, prefill_base=0, prefill_per_prompt=0,
    decode_base=0, decode_per_sequence=0, image_transfer=0, kv_transfer=0, switch_llm=0.2,
    switch_encoder=0.7, encode_batch=1, prefill_batch=1, decode_batch=10**9,
)  # fmt: skip
BENCH = Path(__file__).parents[2] / "docs/bench"


def poisson(rate: float, count: int, *, images: int, tokens: int, seed: int = 0) -> Trace:
    rng, at, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        arrivals.append(Arrival(at, images, tokens))
    return Trace("poisson", tuple(arrivals), 0)


def test_events_run_in_order_of_time_and_then_of_making() -> None:
    loop, seen = EventLoop(), []
    loop.at(2.0, lambda: seen.append("late"))
    loop.at(1.0, lambda: loop.after(1.0, lambda: seen.append("later")))
    loop.at(1.0, lambda: seen.append("early"))
    loop.run()
    assert seen == ["early", "late", "later"]
    assert loop.now == 2.0


@pytest.mark.parametrize("use", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("stage", ["encode_per_image", "prefill_per_prompt"])
def test_a_lone_encoder_and_a_lone_prefill_wait_like_m_d_1(use: float, stage: str) -> None:
    times = replace(FREE, **{stage: 1.0})
    outcome = simulate(poisson(use, 20_000, images=1, tokens=1), "1E1P1D", times=times)
    wait = use / (2 * (1 - use))
    assert outcome.ttft - 1.0 == pytest.approx(wait, rel=0.08)


@pytest.mark.parametrize("use", [0.4, 0.7])
def test_decode_steps_that_grow_with_the_batch_are_processor_sharing(use: float) -> None:
    """M/G/1-PS: the mean time in a shared processor is service / (1 - use), whatever the law."""
    tokens, each = 101, 0.01
    rate = use / ((tokens - 1) * each)
    times = replace(FREE, decode_per_sequence=each)
    latencies = [
        simulate(poisson(rate, 2000, images=0, tokens=tokens, seed=seed), "1E1P1D", times=times)
        .latency
        for seed in range(4)
    ]  # fmt: skip
    assert fmean(latencies) == pytest.approx((tokens - 1) * each / (1 - use), rel=0.08)


def test_a_lone_request_takes_the_sum_of_its_stages() -> None:
    trace = Trace("one", (Arrival(3.0, 2, 11),), 0)
    outcome = simulate(trace, "1E1P1D", times=CPU)
    first = CPU.encode(1) + CPU.encode(1) + CPU.prefill(1)
    assert outcome.ttft == pytest.approx(first)
    assert outcome.latency == pytest.approx(first + CPU.kv_transfer + 10 * CPU.decode(1))


def test_a_batch_of_decodes_steps_together_and_the_rest_waits_for_room() -> None:
    times = replace(FREE, decode_base=0.5, decode_per_sequence=0.25, decode_batch=4)
    trace = Trace("six", tuple(Arrival(0.0, 0, 3) for _ in range(6)), 0)
    outcome = simulate(trace, "1E1P1D", times=times)
    # steps of 1, 4, 3, 1, 2 and 1 sequences: whoever is adopted joins after the step under way
    lengths = [0.5 + 0.25 * batch for batch in (1, 4, 3, 1, 2, 1)]
    moments = [sum(lengths[: n + 1]) for n in range(6)]
    ends = sorted(job.finished for job in outcome.jobs)
    expected = [moments[1], *[moments[2]] * 3, moments[4], moments[5]]
    assert ends == pytest.approx(expected)


def test_littles_law_holds_exactly() -> None:
    outcome = simulate(noise(4.0, seed=3), "2E2P4D", times=CPU)
    moments = [(j.arrival.at, 1) for j in outcome.jobs] + [(j.finished, -1) for j in outcome.jobs]
    area, inside, before = 0.0, 0, 0.0
    for at, change in sorted(moments):
        area += inside * (at - before)
        inside, before = inside + change, at
    assert inside == 0
    assert area == pytest.approx(sum(job.latency for job in outcome.jobs))


class Shaker:
    """Moves a random worker anywhere, all the time."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def decide(self, snapshot: Snapshot) -> Decision:
        worker = self._rng.choice(snapshot.workers)
        stage = self._rng.choice(list(Stage))
        return Decision((Move(worker.worker_id, frozenset((stage,))),), "because")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("drain", [0.02, 5.0])
def test_every_request_ends_once_whatever_is_switched(seed: int, drain: float) -> None:
    trace = square(3.0, half=10.0, waves=2, seed=seed)
    small = replace(CPU, decode_batch=6, kv_transfer=0.3)
    outcome = simulate(trace, "3E2P3D", times=small, balancer=Shaker(seed), drain_seconds=drain)
    assert len(outcome.jobs) == len(trace.arrivals)
    assert len(outcome.switches) > 10
    for job in outcome.jobs:
        assert job.produced == job.arrival.tokens
        assert job.images_left == 0
        assert job.holder is None
        assert job.arrival.at < job.first_token <= job.finished
    stages = [stage for stage in Stage if stage.value in outcome.last_split]
    assert len(stages) == 3
    if drain < 0.1:
        assert outcome.recomputed > 0
    else:
        assert all(math.isfinite(switch.drain) for switch in outcome.switches)


def test_a_switch_takes_its_drain_and_its_load() -> None:
    class Once:
        done = False

        def decide(self, snapshot: Snapshot) -> Decision:
            moves = () if self.done else (Move("encode-1", frozenset((Stage.DECODE,))),)
            self.done = True
            return Decision(moves, "now")

    outcome = simulate(shift(2.0), "2E1P1D", times=CPU, balancer=Once())
    (switch,) = outcome.switches
    assert (switch.at, switch.load) == (0.5, CPU.switch_encoder)
    assert 0 <= switch.drain <= CPU.encode(1)
    assert outcome.last_split == "1E1P2D"


def test_the_last_worker_of_a_stage_stays() -> None:
    outcome = simulate(shift(2.0), "1E1P1D", times=CPU, balancer=Shaker(0))
    assert outcome.switches == ()


def test_capacity_is_where_the_queue_stops_growing() -> None:
    rate = CPU.capacity(5, 1, 2, tokens=200)
    under, over = (
        simulate(poisson(share * rate, 1500, images=1, tokens=200), "5E1P2D", times=CPU)
        for share in (0.7, 1.4)
    )
    growth = [
        fmean(j.latency for j in o.jobs[-200:]) / fmean(j.latency for j in o.jobs[300:500])
        for o in (under, over)
    ]
    assert growth[0] < 1.5
    assert growth[1] > 2.0


def test_more_decode_workers_help_long_answers() -> None:
    rate = sustainable_rate(CPU)
    splits = ("5E1P2D", "4E1P3D", "3E1P4D", "2E1P5D", "1E1P6D")
    latencies = [simulate(shift(rate), split, times=CPU).latency for split in splits]
    assert latencies == sorted(latencies, reverse=True)


def _table(name: str) -> list[dict[str, str]]:
    import csv

    with (BENCH / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_cpu_times_are_those_measured() -> None:
    rows = _table("elastic_times.csv")
    told = {
        "encode": (CPU.encode_base, CPU.encode_per_image),
        "prefill": (CPU.prefill_base, CPU.prefill_per_prompt),
        "decode": (CPU.decode_base, CPU.decode_per_sequence),
    }
    for stage, line in told.items():
        assert fitted(rows, stage) == pytest.approx(line, rel=0.01, abs=1e-6)
    (hand_over,) = (
        float(row["transfer_ms"]) for row in _table("cpu.csv")
        if (row["system"], row["load"]) == ("epd 1E1P1D", "2/s")
    )  # fmt: skip
    assert pytest.approx(hand_over / 1000, abs=1e-3) == CPU.kv_transfer


def test_the_h200_times_are_those_measured() -> None:
    rows = _table("offline_eager_h200.csv")

    def value(metric: str) -> float:
        return fmean(
            float(row["value"]) / 1000 for row in rows
            if row["metric"] == metric and row["images"] == "1"
        )  # fmt: skip

    pixels, encode = value("TTFT: pixels on the host"), value("TTFT: encode")
    assert pytest.approx(pixels + encode, rel=0.01) == H200.encode_per_image
    assert pytest.approx(value("TTFT: prefill and first token"), rel=0.01) == H200.prefill(1)
    assert pytest.approx(value("TPOT"), rel=0.01) == H200.decode(32)
