"""Block tables kept as arrays, against the lists they follow."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from epd.block_rows import BlockRows
from epd.kv.blocks import BlockTable


def _sequence(name: str, groups: int = 2) -> Any:
    return SimpleNamespace(
        request_id=name, table=BlockTable([[] for _ in range(groups)], [0] * groups)
    )


def test_rows_are_their_tables_however_those_grow_and_are_replaced() -> None:
    source, rows = random.Random(1), BlockRows()
    sequences = {name: _sequence(name) for name in "abcd"}
    for step in range(400):
        for name, sequence in sequences.items():
            for blocks in sequence.table.blocks:
                blocks += [source.randrange(10**6) for _ in range(source.choice((0, 0, 1, 90)))]
            if source.random() < 0.02:  # preempted: computed again, in other blocks
                sequence.table = _sequence(name).table
            for group, blocks in enumerate(sequence.table.blocks):
                assert rows.of(sequence, group).tolist() == blocks, (step, name)
        rows.keep(sequences.values())


def test_who_left_is_forgotten() -> None:
    rows = BlockRows()
    staying = _sequence("staying")
    for number in range(1000):
        rows.of(_sequence(f"r{number}"), 0)
        rows.of(staying, 0)
        rows.keep([staying])
        assert len(rows._known) <= 70
    assert "staying" in rows._known
