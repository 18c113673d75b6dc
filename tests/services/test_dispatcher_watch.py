"""The watch over the workers goes on, whatever one look at them brought; the page shows them."""

from __future__ import annotations

import asyncio
import re

from epd.messages import Heartbeat, WorkerStats
from epd.wire import Envelope
from epd_services.gateway.page import page_response


def test_a_failing_look_is_not_the_last(world, monkeypatch):
    async def scenario():
        async with world() as w:
            looks = []

            def tick():
                looks.append(1)
                if len(looks) == 1:
                    raise RuntimeError("one bad look")

            monkeypatch.setattr(w.roles, "tick", tick)
            watching = asyncio.create_task(w.dispatcher._watch())
            while len(looks) < 3 and not watching.done():
                await asyncio.sleep(0.01)
            assert not watching.done()
            watching.cancel()

    world.run(scenario())


def test_the_page_asks_for_columns_that_there_are(world):
    page = bytes(page_response().body).decode()
    columns = re.search(r"const COLUMNS = \[(.*?)\];", page, re.DOTALL)
    assert columns is not None
    keys = re.findall(r'"(\w+)"\]', columns[1])

    async def scenario():
        async with world() as w:
            for worker in w.dispatcher.pipeline()["workers"]:
                assert len(keys) > 5 and set(keys) <= worker.keys()

    world.run(scenario())


def test_a_refused_worker_is_logged_once(world, log_lines):
    async def scenario():
        async with world() as w:
            beat = Heartbeat(
                address="x", revision="other", encoder_revision="e", dtype="float32",
                stats=WorkerStats(),
            )  # fmt: skip
            for _ in range(3):
                w.dispatcher._heartbeat(Envelope("stray", 1, 0, "D", "gateway", 1), beat, ())
            lines = [line for line in log_lines if "worker refused" in line and "stray" in line]
            assert len(lines) == 1 and "revision other" in lines[0]

    world.run(scenario())
