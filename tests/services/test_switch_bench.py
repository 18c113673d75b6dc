"""The load around role switches: what is asked, what is chosen, what counts as bad."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest
from PIL import Image

from epd.errors import ConfigError
from epd_services.bench_load import Picture
from epd_services.client import Reply
from epd_services.switch_bench import OpenLoop, choose_switch, parse_rates
from epd_services.switch_bench import _bad as bad
from epd_services.switch_bench import _beyond_drain as beyond_drain

PICTURES = [Picture(f"question {n}", Image.new("RGB", (2, 2)), bytes([n])) for n in range(5)]
ANSWERS = [f"answer {n}" for n in range(5)]


class Service:
    """Answers every picture rightly, except those in `wrong`."""

    def __init__(self, wrong: tuple[int, ...] = ()) -> None:
        self.asked: list[tuple[int, str, float]] = []
        self._wrong = wrong

    async def ask(self, question: str, images: list[bytes], **options: Any) -> Reply:
        number = images[0][0]
        self.asked.append((number, options["cache_salt"], time.perf_counter()))
        text = "nonsense" if number in self._wrong else ANSWERS[number]
        return Reply(
            status=200, text=text, finish_reason="length", ttft=0.1, total=0.2,
            usage={"completion_tokens": options["max_tokens"]},
        )  # fmt: skip


def loop(service: Any, *, repeat: float = 0.0, seed: int = 0) -> OpenLoop:
    return OpenLoop(service, PICTURES, ANSWERS, 4, repeat, random.Random(seed), "a")


def test_a_picture_is_new_to_the_caches_in_every_round_and_known_when_repeated() -> None:
    chosen = loop(Service(), repeat=0.3, seed=3)
    numbers = [chosen.choose() for _ in range(4000)]
    seen: set[int] = set()
    repeated = 0
    for number in numbers:
        repeated += number in seen
        seen.add(number)
    assert repeated / len(numbers) == pytest.approx(0.3, abs=0.03)

    service = Service()

    async def ask_all() -> None:
        asking = loop(service)
        asking.send(11)
        row = await asking.finish(time.perf_counter())
        assert (row["requests"], row["complete"], row["wrong"]) == (11, 11, 0)

    asyncio.run(ask_all())
    assert [number for number, _, _ in service.asked] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    assert [salt for _, salt, _ in service.asked] == ["a-0"] * 5 + ["a-1"] * 5 + ["a-2"]


def test_requests_arrive_at_their_rate_and_wrong_answers_are_counted() -> None:
    service = Service(wrong=(2,))

    async def ask_for(seconds: float) -> Any:
        asking = loop(service)
        begin = time.perf_counter()
        arriving = asyncio.create_task(asking.arrive(200.0))
        await asyncio.sleep(seconds)
        arriving.cancel()
        return await asking.finish(begin)

    row = asyncio.run(ask_for(1.0))
    assert row["requests"] == pytest.approx(200, rel=0.35)
    wrong = sum(number == 2 for number, _, _ in service.asked)
    assert (row["wrong"], row["lost"], row["duplicate"]) == (wrong, 0, 0)
    assert bad([row], [])


class Admin:
    """Two workers of D, one of E, one of P: only those of D may move."""

    def status(self) -> dict[str, Any]:
        stages = {"e": "E", "p": "P", "d": "D", "d2": "D"}
        return {"workers": [{"name": n, "stages": s} for n, s in stages.items()]}

    def preview(self, worker: str, stages: str, *, force: bool) -> dict[str, Any]:
        keeps = {"e": "E", "p": "P"}.get(worker, "")
        return {"refused": [] if keeps in stages else [{"code": "last_worker"}]}


def test_every_switch_that_is_possible_is_chosen_some_time() -> None:
    admin: Any = Admin()
    chosen = {choose_switch(admin, random.Random(seed)) for seed in range(400)}
    roles = {"E", "P", "D", "EP", "ED", "PD", "EPD"}
    of_d = {(name, role) for name in ("d", "d2") for role in roles - {"D"}}
    of_e = {("e", role) for role in ("EP", "ED", "EPD")}
    of_p = {("p", role) for role in ("EP", "PD", "EPD")}
    assert chosen == of_d | of_e | of_p


def test_no_switch_is_chosen_when_all_are_refused() -> None:
    class Alone(Admin):
        def preview(self, worker: str, stages: str, *, force: bool) -> dict[str, Any]:
            return {"refused": [{"code": "last_worker"}]}

    alone: Any = Alone()
    assert choose_switch(alone, random.Random(0)) is None


@pytest.mark.parametrize("text", ["fast", "0", "-1", "2,,x", "nan", "inf", ","])
def test_rates_must_be_positive_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match="Cannot offer the rates"):
        parse_rates(text)
    assert parse_rates("20, 4.5") == [20.0, 4.5]


def test_what_makes_the_measurement_fail() -> None:
    fine = {"lost": 0, "duplicate": 0, "wrong": 0, "refused": 0}
    assert not bad([fine], [{"state": "done"}])
    assert bad([fine], [{"state": "done"}, {"state": "failed"}])
    for name in fine:
        assert bad([fine | {name: 1}], [])
    assert beyond_drain({"total_s": 2.5, "drain_s": 1.0}) == 1.5
    assert beyond_drain({"total_s": "", "drain_s": ""}) == 0.0
