"""Keys and entries: nothing but the very same content under the very same key is a hit."""

from __future__ import annotations

import hashlib
import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.cache.base import HEADER_BYTES, CachedTokens, pack_entry, unpack_entry
from epd.cache.keys import pixel_digest, token_cache_key
from epd.errors import MediaError

TOKENS = CachedTokens("float32", (3, 2), bytes(range(24)))
POOL = CachedTokens("float32", (3, 2), bytes(range(68)), (("int32", (5,)), ("float16", (3, 4))))
KEY = "k" * 64


def _prefixed(*fields: bytes) -> bytes:
    return b"".join(struct.pack("<Q", len(field)) + field for field in fields)


def test_pixel_digest_is_the_documented_sha256() -> None:
    rgb = bytes(range(2 * 1 * 3))
    expected = hashlib.sha256(_prefixed(b"epd-pixels-1", b"RGB8", b"2", b"1", rgb)).hexdigest()
    assert pixel_digest(2, 1, rgb) == pixel_digest(2, 1, memoryview(rgb)) == expected


def test_pixel_digests_of_the_collision_set_all_differ() -> None:
    same_bytes = bytes(30 * 100 * 3)
    red, blue = b"\xff\0\0" * 4, b"\0\0\xff" * 4
    digests = [
        *(pixel_digest(w, h, same_bytes) for w, h in ((30, 100), (100, 30), (3000, 1), (1, 3000))),
        *(pixel_digest(2, 2, rgb) for rgb in (red, blue)),
        *(pixel_digest(w, h, red) for w, h in ((4, 1), (1, 4))),
        pixel_digest(1, 11, bytes(33)),
        pixel_digest(11, 1, bytes(33)),
    ]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize(
    ("width", "height", "size"), [(2, 2, 11), (2, 2, 13), (0, 0, 0), (-1, -1, 3)]
)
def test_pixels_of_another_size_are_refused(width: int, height: int, size: int) -> None:
    with pytest.raises(MediaError):
        pixel_digest(width, height, bytes(size))


def test_token_key_is_the_documented_sha256() -> None:
    key = token_cache_key(
        mm_hash="m", encoder_revision="r", pruner_fingerprint="p", dtype="float16", salt="s"
    )
    fields = (b"epd-tokens-1", b"m", b"r", b"p", b"float16", b"s")
    assert key == hashlib.sha256(_prefixed(*fields)).hexdigest()


FIELDS = ("mm_hash", "encoder_revision", "pruner_fingerprint", "dtype", "salt")


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_the_token_key(field: str) -> None:
    base = dict.fromkeys(FIELDS, "same")
    assert token_cache_key(**base) != token_cache_key(**base | {field: "other"})


texts = st.text(alphabet="ab\0", max_size=3)


@given(st.tuples(*[texts] * 5), st.tuples(*[texts] * 5))
def test_token_keys_are_equal_only_for_equal_fields(one: tuple[str], two: tuple[str]) -> None:
    def key(values: tuple[str]) -> str:
        return token_cache_key(**dict(zip(FIELDS, values, strict=True)))

    assert (key(one) == key(two)) == (one == two)


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (0, 8), (576, 64)], ids=str)
def test_an_entry_gives_back_what_was_packed(dtype: str, size: int, shape: tuple[int, int]) -> None:
    data = hashlib.shake_256(b"tokens").digest(shape[0] * shape[1] * size)
    value = CachedTokens(dtype, shape, memoryview(data))
    entry = pack_entry(KEY, value)
    assert len(entry) == HEADER_BYTES + len(data)
    back = unpack_entry(KEY, entry)
    assert back is not None
    assert (back.dtype, back.shape, bytes(back.data)) == (dtype, shape, data)


@pytest.mark.parametrize("value", [TOKENS, POOL], ids=["tokens", "pool"])
def test_every_flipped_bit_is_a_miss(value: CachedTokens) -> None:
    entry = pack_entry(KEY, value)
    for position, bit in itertools.product(range(len(entry)), range(8)):
        damaged = bytearray(entry)
        damaged[position] ^= 1 << bit
        assert unpack_entry(KEY, bytes(damaged)) is None, (position, bit)


@pytest.mark.parametrize("value", [TOKENS, POOL], ids=["tokens", "pool"])
def test_every_truncation_and_extension_is_a_miss(value: CachedTokens) -> None:
    entry = pack_entry(KEY, value)
    assert all(unpack_entry(KEY, entry[:length]) is None for length in range(len(entry)))
    assert unpack_entry(KEY, entry + b"\0") is None
    assert unpack_entry(KEY, b"\0" + entry) is None


def test_an_entry_under_another_key_is_a_miss() -> None:
    entry = pack_entry(KEY, TOKENS)
    assert unpack_entry(KEY[:-1] + "j", entry) is None
    assert unpack_entry(KEY[:-1], entry) is None


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param((b"EPDX", 2, 1, 0, 3, 2), id="magic"),
        pytest.param((b"EPDT", 1, 1, 0, 3, 2), id="version"),
        pytest.param((b"EPDT", 2, 9, 0, 3, 2), id="dtype"),
        pytest.param((b"EPDT", 2, 4, 0, 3, 2), id="whole numbers as tokens"),
        pytest.param((b"EPDT", 2, 1, 1, 3, 2), id="a tensor beside"),
        pytest.param((b"EPDT", 2, 1, 65535, 3, 2), id="many tensors beside"),
        pytest.param((b"EPDT", 2, 1, 0, 3, 3), id="shape"),
        pytest.param((b"EPDT", 2, 1, 0, 2**32 - 1, 2**32 - 1), id="huge shape"),
    ],
)
def test_a_lying_header_is_a_miss_in_spite_of_its_digest(fields: tuple[bytes | int, ...]) -> None:
    assert unpack_entry(KEY, _sealed(*fields)) is None


def test_an_entry_is_laid_out_as_documented() -> None:
    assert _sealed(b"EPDT", 2, 1, 0, 3, 2) == pack_entry(KEY, TOKENS)
    table = struct.pack("<BBIIBBII", 4, 1, 5, 0, 2, 2, 3, 4)
    payload = table + bytes(POOL.data)
    assert _sealed(b"EPDT", 2, 1, 2, 3, 2, payload=payload) == pack_entry(KEY, POOL)


def _sealed(*fields: bytes | int, payload: bytes = bytes(TOKENS.data)) -> bytes:
    header = struct.pack("<4sBBHII", *fields)
    name = struct.pack("<Q", len(KEY)) + KEY.encode()
    return header + hashlib.sha256(b"epd-entry-2" + name + header + payload).digest() + payload


def test_tensors_beside_the_tokens_come_back_as_they_were() -> None:
    back = unpack_entry(KEY, pack_entry(KEY, POOL))
    assert back is not None
    assert (back.beside, bytes(back.data)) == (POOL.beside, POOL.data)
    parts = [(dtype, shape, bytes(data)) for dtype, shape, data in back.tensors]
    data = bytes(range(68))
    assert parts == [
        ("float32", (3, 2), data[:24]), ("int32", (5,), data[24:44]),
        ("float16", (3, 4), data[44:]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "table",
    [
        pytest.param((9, 1, 11, 0), id="dtype"),
        pytest.param((4, 3, 11, 1), id="dimensions"),
        pytest.param((4, 0, 11, 0), id="no dimension"),
        pytest.param((4, 1, 11, 1), id="columns of a vector"),
        pytest.param((4, 1, 12, 0), id="rows"),
    ],
)
def test_a_lying_table_is_a_miss_in_spite_of_its_digest(table: tuple[int, ...]) -> None:
    payload = struct.pack("<BBII", *table) + bytes(24 + 44)
    honest = struct.pack("<BBII", 4, 1, 11, 0) + bytes(24 + 44)
    assert unpack_entry(KEY, _sealed(b"EPDT", 2, 1, 1, 3, 2, payload=honest)) is not None
    assert unpack_entry(KEY, _sealed(b"EPDT", 2, 1, 1, 3, 2, payload=payload)) is None


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_miss(entry: bytes) -> None:
    assert unpack_entry(KEY, entry) is None


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("float64", (1, 1), 8),
        ("float32", (1, 1), 3),
        ("float32", (2**32, 0), 0),
        ("object", (1, 1), 8),
        ("int32", (1, 1), 4),
    ],
)
def test_tokens_that_cannot_be_are_refused(dtype: str, shape: tuple[int, int], size: int) -> None:
    with pytest.raises(ValueError, match="vision tokens"):
        CachedTokens(dtype, shape, bytes(size))
