"""Pixels on their way to an encoder: made ready once, and not on the event loop's time."""

from __future__ import annotations

from dataclasses import replace

from epd.messages import EncodeRequest


def test_pixels_are_sealed_before_they_are_posted_and_only_once(world, monkeypatch):
    async def scenario():
        async with world() as w:
            sealed, posted = [], []
            post = w.node.post

            async def seal(blobs):
                sealed.extend(blobs)
                return [replace(blob, digest=bytes(32)) for blob in blobs]

            def watched(to, message, blobs=()):
                if isinstance(message, EncodeRequest):
                    posted.extend(blobs)
                return post(to, message, blobs)

            monkeypatch.setattr(w.node, "sealed", seal)
            monkeypatch.setattr(w.node, "post", watched)
            generation = w.ask(images=2)
            await w.settle()
            (record,) = w.dispatcher.attempts.records.values()
            w.dispatcher.attempts.encode_again(record, [1])
            assert [bytes(blob.data)[0] for blob in sealed] == [0, 1]
            assert [bytes(blob.data)[0] for blob in posted] == [0, 1, 1]
            assert all(blob.digest == bytes(32) for blob in posted)
            generation.cancel()

    world.run(scenario())


def test_a_request_cancelled_while_its_pixels_are_sealed_reaches_no_encoder(world, monkeypatch):
    async def scenario():
        async with world() as w:

            async def cancelling(blobs):
                generation.cancel()
                return list(blobs)

            monkeypatch.setattr(w.node, "sealed", cancelling)
            generation = w.ask(images=1)
            await w.settle()
            assert not w.worker("e").read(EncodeRequest)

    world.run(scenario())
