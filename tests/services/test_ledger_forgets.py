"""What has ended is let go at once, not when its deadline comes."""

from __future__ import annotations

import gc

from epd_services.gateway.dispatch_api import ImagePixels
from epd_services.gateway.ledger import Record


def held():
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) in (Record, ImagePixels)]


def test_an_ended_request_keeps_no_pixels(world):
    async def scenario():
        async with world() as w:
            before = len(held())
            generation = w.ask(images=2)
            await w.settle()
            assert len(held()) == before + 3
            generation.cancel()
            del generation
            await w.settle()
            assert len(held()) == before

    world.run(scenario())
