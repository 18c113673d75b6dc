"""The watch over the workers goes on, whatever one look at them brought."""

from __future__ import annotations

import asyncio


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
