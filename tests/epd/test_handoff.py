"""A handoff is checked against the model before anything is allocated for it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from epd.errors import WireError
from epd.kv.handoff import KVHandoff, ModelFacts
from epd.kv.pool import KVPool
from epd.request import SamplingParams

FACTS = ModelFacts(
    revision="r", num_layers=3, num_kv_heads=2, head_dim=8, dtype="bfloat16", vocab_size=50,
    max_position=9, layer_group=(0, 0, 1), kv_formats=("bf16", "int4", "fp8"),
)  # fmt: skip
GOOD = KVHandoff(
    request_id="a", prompt_token_ids=[1, 49, 3, 60], output_token_ids=[7, 8],
    sampling=SamplingParams(max_tokens=5), kv_lengths=[5, 3], next_pos=5, revision="r",
    num_layers=3, num_kv_heads=2, head_dim=8, dtype="bfloat16", layer_group=[0, 0, 1],
    kv_formats=["bf16", "int4", "fp8"],
)  # fmt: skip


def test_a_good_handoff_passes_and_survives_the_wire():
    GOOD.validate(FACTS)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(GOOD), type=KVHandoff) == GOOD
    assert [GOOD.shape(i) for i in range(3)] == [(2, 5, 2, 8), (2, 5, 2, 8), (2, 3, 2, 12)]


def test_positions_run_ahead_of_the_kv_where_tokens_were_pruned():
    for ahead in (5, 6, 8):
        msgspec.structs.replace(GOOD, next_pos=ahead).validate(FACTS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("revision", "other"), ("num_layers", 4), ("num_kv_heads", 1), ("head_dim", 16),
        ("dtype", "float32"), ("layer_group", [0, 1, 1]), ("layer_group", [0, 0]),
        ("prompt_token_ids", []), ("output_token_ids", []), ("prompt_token_ids", [1, -1, 3, 4]),
        ("output_token_ids", [7, 50]), ("output_token_ids", [7, -1]),
        ("output_token_ids", [7, 8, 9, 10, 11]), ("kv_lengths", [5]), ("kv_lengths", [6, 3]),
        ("kv_lengths", [4, 3]), ("kv_lengths", [5, 6]), ("kv_lengths", [5, 0]),
        ("kv_lengths", [5, -1]), ("next_pos", 4), ("next_pos", 9), ("next_pos", 0),
        ("next_pos", -1), ("next_pos", 1 << 40),
        ("sampling", SamplingParams(temperature=float("nan"))),
        ("sampling", SamplingParams(max_tokens=2)), ("kv_formats", ["bf16", "int4"]),
        ("kv_formats", ["bf16", "int4", "int4"]), ("kv_formats", []),
    ],
)  # fmt: skip
def test_whatever_does_not_fit_is_refused(field: str, value: Any):
    with pytest.raises(WireError, match="KV handoff"):
        msgspec.structs.replace(GOOD, **{field: value}).validate(FACTS)


def test_pool_moves_exactly_the_slots_it_is_asked_for():
    def pool(num_blocks: int, block_size: int) -> KVPool:
        made = KVPool(3, num_blocks=num_blocks, block_size=block_size, num_kv_heads=2, head_dim=8,
                      dtype=torch.float32, device="cpu")  # fmt: skip
        made.fill(-1.0)
        return made

    source, target = pool(6, 4), pool(5, 3)
    tokens = torch.randn(3, 2, 7, 2, 8)
    blocks = [4, 1]
    for layer in range(3):
        for kv in range(2):
            for i in range(7):
                source.layer(layer)[kv][blocks[i // 4], i % 4] = tokens[layer, kv, i]
    moved = source.gather(blocks, 7)
    assert torch.equal(torch.stack(moved), tokens)
    target.scatter([2, 0, 4], moved)
    assert torch.equal(torch.stack(target.gather([2, 0, 4], 7)), tokens)
    assert all((target.layer(i)[0][[1, 3]] == -1).all() for i in range(3))
    assert (target.layer(0)[0][4, 1:] == -1).all()
    assert source.bytes() == 6 * KVPool.block_bytes(
        3, block_size=4, num_kv_heads=2, head_dim=8, dtype=torch.float32
    )


def test_pool_moves_single_layers():
    pool = KVPool(2, num_blocks=2, block_size=4, num_kv_heads=1, head_dim=2, dtype=torch.float32,
                  device="cpu")  # fmt: skip
    pool.scatter([1], [torch.ones(2, 3, 1, 2)], layers=[1])
    assert pool.layer(0)[0].sum() == 0
    assert pool.layer(1)[0].sum() == 6
    (read,) = pool.gather([1], 3, layers=[1])
    assert torch.equal(read, torch.ones(2, 3, 1, 2))
