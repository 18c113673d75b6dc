"""A toy decoder of four layers: rows dropped under kept positions are rows masked."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from epd_pruning import available, layer_pruner
from epd_pruning.layer_base import LayerInputs, LayerPruner
from epd_pruning.positions import PositionPolicy, place
from epd_pruning.schedule import Schedule

LAYERS, HEADS, KV_HEADS, HEAD, WIDTH = 4, 4, 2, 8, 32
BEFORE, VISION, TEXT, NEW = 3, 24, 7, 32
SCHEDULE = Schedule((0, 2), (13, 5))
SCALE = HEAD**-0.5


@dataclass
class Layer:
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    up: Tensor


@dataclass
class Run:
    """Rows that each layer saw, their keys and values, and the last layer's output."""

    rows: list[Tensor] = field(default_factory=list)
    cache: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))


def decoder() -> list[Layer]:
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * shape[0] ** -0.5

    return [
        Layer(
            matrix(WIDTH, HEADS * HEAD) * 2,
            matrix(WIDTH, KV_HEADS * HEAD) * 2,
            matrix(WIDTH, KV_HEADS * HEAD),
            matrix(HEADS * HEAD, WIDTH),
            matrix(WIDTH, WIDTH),
        )
        for _ in range(LAYERS)
    ]


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    angles = positions[:, None] * 100.0 ** -(torch.arange(HEAD // 2) / (HEAD // 2))
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def project(layer: Layer, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x @ w for w in (layer.query, layer.key, layer.value))
    q, k, v = (t.view(len(x), -1, HEAD).transpose(0, 1) for t in (q, k, v))
    return rotate(q, positions), rotate(k, positions), v


def block(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=0) for t in (k, v))
    attention = (q @ k.mT * SCALE).masked_fill(~visible, -torch.inf).softmax(-1)
    x = x + (attention @ v).transpose(0, 1).flatten(1) @ layer.out
    return x + torch.tanh(x @ layer.up)


def prompt(count: int = BEFORE + VISION + TEXT) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def prefill_dropping(pruner: LayerPruner | None) -> Run:
    """Really take the dropped rows out, positions kept."""
    x, run, layers = prompt(), Run(), decoder()
    rows = torch.arange(len(x))
    raters = torch.ones(TEXT, dtype=torch.bool)
    for index, layer in enumerate(layers):
        q, k, v = project(layer, x, rows)
        x = block(layer, x, q, k, v, rows[:, None] >= rows)
        run.rows.append(rows)
        run.cache.append((k, v))
        stage = pruner.schedule.stage_of(index) if pruner else None
        if pruner is None or stage is None:
            continue
        if pruner.reads == "next":
            q, k, _ = project(layers[index + 1], x, rows)
        vision = ((rows >= BEFORE) & (rows < BEFORE + VISION)).nonzero()[:, 0]
        text = (rows >= BEFORE + VISION).nonzero()[:, 0]
        inputs = LayerInputs(queries=q[:, text], keys=k, vision=vision, text=text, scale=SCALE,
                             hidden=x, raters=raters)  # fmt: skip
        kept = pruner.select(inputs, stage, VISION).vision
        stay = torch.cat([torch.arange(BEFORE), kept, text])
        placed = place(torch.arange(BEFORE + VISION + TEXT), rows[stay], PositionPolicy.KEEP)
        assert placed.next_pos == BEFORE + VISION + TEXT
        x, rows = x[stay], placed.positions
    run.hidden = x
    return run


def forward_masking(x: Tensor, seen: list[Tensor]) -> Tensor:
    """One full forward in which layer ℓ may look at the prompt rows `seen`[ℓ] only."""
    rows = torch.arange(len(x))
    for layer, allowed in zip(decoder(), seen, strict=True):
        visible = rows >= BEFORE + VISION + TEXT
        visible[allowed] = True
        x = block(layer, x, *project(layer, x, rows), (rows[:, None] >= rows) & visible)
    return x


@pytest.mark.parametrize("name", available("layer"))
def test_dropped_rows_are_masked_rows(name: str) -> None:
    run = prefill_dropping(layer_pruner(name, SCHEDULE))
    masked = forward_masking(prompt(), run.rows)
    torch.testing.assert_close(run.hidden, masked[run.rows[-1]])
    dense = forward_masking(prompt(), [torch.arange(len(prompt()))] * LAYERS)
    assert not torch.allclose(run.hidden[-1], dense[-1])


@pytest.mark.parametrize("name", available("layer"))
def test_every_layer_holds_what_the_schedule_says(name: str) -> None:
    run = prefill_dropping(layer_pruner(name, SCHEDULE))
    lengths = [keys.shape[1] - BEFORE - TEXT for keys, _ in run.cache]
    assert tuple(lengths) == SCHEDULE.lengths(VISION, LAYERS) == (24, 13, 13, 5)


def test_a_schedule_that_keeps_all_is_the_dense_run_bit_for_bit() -> None:
    for name in available("layer"):
        idle = prefill_dropping(layer_pruner(name, Schedule((0, 2), ratios=(1.0, 1.0))))
        assert torch.equal(idle.hidden, prefill_dropping(None).hidden)


@pytest.mark.parametrize("name", available("layer"))
def test_decoding_on_the_pruned_cache_is_one_masked_forward(name: str) -> None:
    run = prefill_dropping(layer_pruner(name, SCHEDULE))
    everything = prompt(BEFORE + VISION + TEXT + NEW)
    everything[: BEFORE + VISION + TEXT] = prompt()
    expected = forward_masking(everything, run.rows)
    cache = list(run.cache)
    for position in range(BEFORE + VISION + TEXT, len(everything)):
        x = everything[position : position + 1]
        for index, layer in enumerate(decoder()):
            q, k, v = project(layer, x, torch.tensor([position]))
            keys, values = (torch.cat(pair, 1) for pair in zip(cache[index], (k, v), strict=True))
            cache[index] = (keys, values)
            x = block(layer, x, q, keys, values, torch.ones(1, keys.shape[1], dtype=torch.bool))
        torch.testing.assert_close(x[0], expected[position])
    assert [keys.shape[1] for keys, _ in cache] == [len(r) + NEW for r in run.rows]
