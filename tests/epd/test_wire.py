"""Frames: round trips, and everything that must be refused."""

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from epd.errors import ConfigError, WireError
from epd.messages import MESSAGES, Cancel, KVRenew, Message, Tokens, VisionTokens
from epd.request import TokenOutput
from epd.tensors import from_blob, to_blob
from epd.transport import check_bind
from epd.wire import Blob, Codec, Envelope, Frame, WireLimits

KEY = bytes(range(32))
TO = "prefill-0"


def envelope(seq: int = 1, to: str = TO) -> Envelope:
    return Envelope("encode-0", 7, 3, "E", to, seq)


def vision() -> tuple[VisionTokens, list[Blob]]:
    tokens = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return VisionTokens(request_id="r", attempt=2, item=0, cache_key="k"), [to_blob(tokens)]


def sent(codec: Codec, message: Message, blobs: list[Blob]) -> list[Frame]:
    return [bytes(frame) for frame in codec.encode(envelope(), message, blobs)]


@pytest.mark.parametrize("key", [None, KEY], ids=["open", "keyed"])
def test_a_message_comes_back_as_it_was(key: bytes | None) -> None:
    codec = Codec(key)
    message, blobs = vision()
    incoming = codec.decode(sent(codec, message, blobs), TO)
    assert incoming.envelope == envelope()
    assert incoming.message == message
    assert torch.equal(from_blob(incoming.blobs[0]), torch.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(0, 4), (1,), (5, 3, 2)])
def test_every_dtype_travels_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 100, shape).to(dtype)
    back = from_blob(to_blob(tensor))
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


def test_a_non_contiguous_tensor_travels_by_value() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    assert torch.equal(from_blob(to_blob(tensor)), tensor)


def test_every_byte_is_under_the_mac() -> None:
    codec = Codec(KEY)
    message, blobs = vision()
    frames = sent(codec, message, blobs)
    for i, frame in enumerate(frames):
        for at in range(0, len(frame), max(1, len(frame) // 8)):
            broken = [*frames]
            broken[i] = bytes(frame[:at]) + bytes([frame[at] ^ 1]) + bytes(frame[at + 1 :])
            with pytest.raises(WireError):
                codec.decode(broken, TO)


def test_a_buffer_is_read_once_where_it_was_digested_before() -> None:
    codec = Codec(KEY)
    message, blobs = vision()
    assert Codec().digested(blobs) == blobs
    ready = codec.digested(blobs)
    assert [one.digest for one in codec.digested(ready)] == [one.digest for one in ready]
    assert sent(codec, message, ready) == sent(codec, message, blobs)
    other = replace(ready[0], data=bytes(48))
    frames = sent(codec, message, [other])
    incoming = codec.open(frames, TO)
    assert incoming.envelope == envelope(), "the sender is known before the buffers are read"
    with pytest.raises(WireError, match="bad authentication"):
        codec.check(incoming.blobs)


def test_digests_cannot_be_moved_between_buffers_or_taken_for_a_header() -> None:
    codec = Codec(KEY)
    message = vision()[0]
    frames = sent(codec, message, [Blob("uint8", (2,), b"ab"), Blob("uint8", (2,), b"cd")])
    tag, header, first, second, seal = frames
    swapped = bytes(seal[:33]) + bytes(seal[65:]) + bytes(seal[33:65])
    with pytest.raises(WireError, match="bad authentication"):
        codec.decode([tag, header, second, first, swapped], TO)


def test_the_seal_of_another_version_is_refused_by_name() -> None:
    codec = Codec(KEY)
    frames = sent(codec, *vision())
    first = hashlib.blake2b(key=KEY, digest_size=32)  # what the first version sent
    for frame in frames[:-1]:
        first.update(len(frame).to_bytes(8, "little") + frame)
    for seal in (first.digest(), b"\x03" + bytes(frames[-1])[1:]):
        with pytest.raises(WireError, match="another version of the wire"):
            codec.decode([*frames[:-1], seal], TO)


def test_frames_cannot_be_moved_between_messages_or_stripped() -> None:
    codec = Codec(KEY)
    first = sent(codec, *vision())
    other = sent(codec, VisionTokens(request_id="s", attempt=2, item=0, cache_key="k"), vision()[1])
    for frames in ([*first[:1], other[1], *first[2:]], first[:-1], first[1:], [], [first[-1]]):
        with pytest.raises(WireError):
            codec.decode(frames, TO)
    with pytest.raises(WireError):
        codec.decode(sent(Codec(None), *vision()), TO)
    with pytest.raises(WireError):
        codec.decode(sent(Codec(bytes(32)), *vision()), TO)


def test_a_message_for_somebody_else_is_refused() -> None:
    codec = Codec(KEY)
    with pytest.raises(WireError, match="another node"):
        codec.decode(sent(codec, *vision()), "decode-0")


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("float32", (3, 5)), ("float64", (3, 4)), ("object", (3, 4)), ("float32", (1 << 39, 4))],
)
def test_shape_dtype_and_bytes_must_agree(dtype: str, shape: tuple[int, ...]) -> None:
    codec = Codec()
    message, blobs = vision()
    with pytest.raises(WireError):
        codec.decode(sent(codec, message, [Blob(dtype, shape, blobs[0].data)]), TO)


def test_oversized_and_too_many_parts_are_refused_before_decoding() -> None:
    small = Codec(limits=WireLimits(frame_bytes=64, message_bytes=128, buffers=2))
    message, blobs = vision()
    frames = sent(Codec(), message, [Blob("uint8", (65,), bytes(65))])
    with pytest.raises(WireError, match="oversized"):
        small.decode(frames, TO)
    with pytest.raises(WireError, match="parts"):
        small.decode(sent(Codec(), message, blobs * 4), TO)


def test_random_mutations_never_raise_anything_but_wire_error() -> None:
    codec = Codec()
    rng = random.Random(5)
    base = sent(codec, *vision())
    tokens = sent(codec, Tokens(tokens=[]), [])
    accepted = 0
    for _ in range(5000):
        frames = [bytearray(f) for f in rng.choice([base, tokens])]
        for _ in range(rng.randint(1, 4)):
            frame = rng.choice(frames)
            if frame:
                frame[rng.randrange(len(frame))] = rng.randrange(256)
        try:
            codec.decode([bytes(f) for f in frames], TO)
            accepted += 1
        except WireError:
            pass
    assert accepted < 5000


def test_pickles_and_foreign_bytes_are_wire_errors() -> None:
    pickled = (
        b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
    )
    for frames in ([pickled], [b"Cancel", pickled], [pickled, pickled], [b"Tokens", b"\xff" * 100]):
        with pytest.raises(WireError):
            Codec().decode(frames, TO)


def test_the_schema_bounds_every_field() -> None:
    codec = Codec()
    for body in (
        {"request_id": "", "attempt": 0},
        {"request_id": "r", "attempt": -1},
        {"request_id": "r", "attempt": 1.5},
        {"request_id": "r" * 129, "attempt": 0},
        {"request_id": "r", "attempt": 0, "extra": 1},
    ):
        frames = sent(codec, Cancel(request_id="r", attempt=0), [])
        good = msgspec.msgpack.decode(frames[1])
        good[2] = body
        with pytest.raises(WireError):
            codec.decode([frames[0], msgspec.msgpack.encode(good)], TO)


def test_every_message_type_is_registered_under_its_name() -> None:
    concrete = {cls for cls in _leaves(Message) if cls.__module__.startswith("epd.")}
    assert set(MESSAGES.values()) == concrete - {
        c for c in concrete if c.__name__ == "RequestMessage"
    }


def _leaves(cls: type) -> set[type]:
    subclasses = cls.__subclasses__()
    return {cls} if not subclasses else set().union(*map(_leaves, subclasses))


def test_token_outputs_travel_with_log_probabilities() -> None:
    codec = Codec()
    renew = KVRenew(request_ids=["a", "b"])
    assert codec.decode(sent(codec, renew, []), TO).message == renew
    output = TokenOutput(3, 17, -0.25, [(17, -0.25), (4, -2.0)])
    packed = msgspec.msgpack.encode(output)
    assert msgspec.msgpack.decode(packed, type=TokenOutput) == output


def test_only_private_or_keyed_addresses_may_be_bound(tmp_path: Path) -> None:
    private = tmp_path / "run"
    private.mkdir(mode=0o700)
    check_bind(f"ipc://{private}/a.sock", keyed=False)
    check_bind("tcp://0.0.0.0:5555", keyed=True)
    open_dir = tmp_path / "open"
    open_dir.mkdir()
    open_dir.chmod(0o755)
    for address in ("tcp://0.0.0.0:5555", "tcp://127.0.0.1:*", f"ipc://{open_dir}/a", "inproc://a"):
        with pytest.raises(ConfigError):
            check_bind(address, keyed=False)


def test_the_kv_of_a_full_context_may_travel() -> None:
    """LLaVA-1.5-7B in bf16: 32 layers of 32 heads of 128 channels, 4,096 positions."""
    layer = 2 * 4096 * 32 * 128 * 2
    assert layer <= WireLimits().frame_bytes
    assert 32 * layer <= WireLimits().message_bytes
