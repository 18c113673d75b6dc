"""The load generator: arrivals that follow their plan, whatever the service does."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from typing import Any

import pytest
from PIL import Image

from epd.errors import ConfigError
from epd_services.bench import plan_bench
from epd_services.bench_load import Arrival, Load, Outcome, Picture, drive, plan_load, summarise
from epd_services.client import Reply


def load(rate: float, count: int, *, repeat: float = 0.0, seed: int = 0) -> Load:
    return plan_load(rate, count, repeat=repeat, first_picture=10, rng=random.Random(seed))


def test_poisson_arrivals_have_the_rate_and_the_spread() -> None:
    dues = [arrival.due for arrival in load(5.0, 4000).arrivals]
    gaps = [b - a for a, b in itertools.pairwise(dues)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert dues[0] == 0.0
    assert mean == pytest.approx(0.2, rel=0.06)
    # an exponential distribution's standard deviation equals its mean
    assert spread == pytest.approx(mean, rel=0.08)


def test_a_burst_is_due_at_once() -> None:
    assert {arrival.due for arrival in load(math.inf, 9).arrivals} == {0.0}


@pytest.mark.parametrize("repeat", [0.0, 0.25, 0.75])
def test_share_of_repeated_pictures(repeat: float) -> None:
    pictures = [arrival.picture for arrival in load(1.0, 4000, repeat=repeat).arrivals]
    fresh = set(pictures)
    assert fresh == set(range(10, 10 + len(fresh)))
    assert 1 - len(fresh) / 4000 == pytest.approx(repeat, abs=0.03)
    first_seen = list(dict.fromkeys(pictures))
    assert first_seen == sorted(first_seen)


def test_same_seed_same_plan() -> None:
    assert load(3.0, 50, repeat=0.5, seed=4) == load(3.0, 50, repeat=0.5, seed=4)
    assert load(3.0, 50, repeat=0.5, seed=4) != load(3.0, 50, repeat=0.5, seed=5)


def test_loads_of_a_plan_share_no_picture() -> None:
    plan = plan_bench("2,6", 20, output_tokens=8, repeat=0.3, topologies="1epd,1e1p1d", seed=0)
    seen = [{arrival.picture for arrival in load.arrivals} for load in plan.loads]
    assert [load.name for load in plan.loads] == ["2/s", "6/s", "burst of 20"]
    assert sum(map(len, seen)) == len(set.union(*seen)) == plan.num_pictures - 2
    assert plan.topologies == ("1EPD", "1E1P1D")


@pytest.mark.parametrize("rates", ["0", "-1", "x", "nan", "inf", "1,2,x"])
def test_rates_that_are_none(rates: str) -> None:
    with pytest.raises(ConfigError, match="rates"):
        plan_bench(rates, 2, output_tokens=8, repeat=0, topologies="1EPD", seed=0)


class FakeClient:
    """Answers after `seconds`; notes when each question came."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.came: list[float] = []
        self.options: dict[str, Any] = {}

    async def ask(self, question: str, images: list[bytes], **options: Any) -> Reply:
        self.came.append(time.perf_counter())
        self.options = options
        await asyncio.sleep(self.seconds)
        return Reply(status=200, text=f"{question}!", finish_reason="length")


def test_arrivals_do_not_wait_for_answers() -> None:
    picture = Picture.of("q", Image.new("RGB", (2, 2)))
    arrivals = tuple(Arrival(0.05 * number, number) for number in range(5))
    client = FakeClient(1.5)
    begin = time.perf_counter()
    outcomes, seconds = asyncio.run(
        drive(client, Load("x", 20.0, arrivals), [picture] * 5, ["q!"] * 4 + ["other"],
              output_tokens=3, advance=lambda done, note: None)
    )  # fmt: skip
    sent = [moment - begin for moment in client.came]
    # a closed loop would send the second one after 1.5 seconds
    assert sent[-1] < 1.4
    assert all(moment >= arrival.due for moment, arrival in zip(sent, arrivals, strict=True))
    assert all(0 <= outcome.late < 1.2 for outcome in outcomes)
    assert 1.7 <= seconds < 3.5
    assert [outcome.right for outcome in outcomes] == [True] * 4 + [False]
    assert client.options == {"max_tokens": 3, "ignore_eos": True, "temperature": 0}


def reply(**facts: Any) -> Reply:
    whole = {"status": 200, "finish_reason": "length", "usage": {"completion_tokens": 4},
             "ttft": 0.1, "tpot": 0.01, "timings": {"encode": 0.02}}  # fmt: skip
    return Reply(**{**whole, **facts})


def test_summary_counts_what_happened() -> None:
    outcomes = [
        Outcome(reply(), 0.0, True),
        Outcome(reply(ttft=0.3, timings={}), 0.05, True),
        Outcome(reply(tpot=0.2), 0.0, False),
        Outcome(reply(repeats=2), 0.0, True),
        Outcome(reply(usage={"completion_tokens": 5}), 0.0, True),
        Outcome(Reply(status=429, error="full", code="queue_full"), 0.0, False),
        Outcome(Reply(error="ConnectError"), 0.0, False),
    ]
    row = summarise(outcomes, 2.0, output_tokens=4)
    counts = ("requests", "complete", "refused", "lost", "duplicate", "wrong")
    assert [row[name] for name in counts] == [7, 5, 1, 1, 2, 1]
    assert row["requests_per_s"] == 2.5
    assert row["tokens_per_s"] == 10.5
    # the wait before the request was sent belongs to its first token
    assert row["ttft_p50_ms"] == pytest.approx(100)
    assert row["ttft_p99_ms"] == pytest.approx(350)
    assert row["tpot_p99_ms"] == pytest.approx(200)
    assert row["encode_ms"] == pytest.approx(16)
    assert row["within_slo"] == pytest.approx(3 / 7)


def test_summary_of_nothing_complete() -> None:
    row = summarise([Outcome(Reply(error="gone"), 0.0, False)], 1.0, output_tokens=4)
    assert (row["lost"], row["complete"], row["requests_per_s"]) == (1, 0, 0.0)
    assert math.isnan(row["ttft_p50_ms"])
