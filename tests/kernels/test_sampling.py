"""Draws against the definition by brute force, on every backend."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate, product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epd_kernels import sampling
from epd_kernels.sampling import DrawConfig

EPS = 2.0**-18
SMALL = DrawConfig(chunk=64, num_warps=4, head=16, pass_chunk=128, pass_warps=4)
WIDE = DrawConfig(chunk=512, num_warps=4, head=512, pass_chunk=512, pass_warps=4)


@dataclass(frozen=True)
class How:
    """What one row is drawn with."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    point: float = 0.5


def draw(backend, logits, rows):
    columns = {
        name: torch.tensor([getattr(row, field) for row in rows], dtype=dtype)
        for name, field, dtype in (
            ("temperature", "temperature", torch.float64), ("top_k", "top_k", torch.int64),
            ("top_p", "top_p", torch.float64), ("min_p", "min_p", torch.float64),
            ("points", "point", torch.float64),
        )
    }  # fmt: skip
    columns = {name: column.to(backend.device) for name, column in columns.items()}
    ids = backend.op("sampling", "draw_tokens")(logits.to(backend.device), **columns)
    assert ids.dtype == torch.int64
    return ids.tolist()


def allowed(logits: list[float], how: How, eps: float = EPS) -> set[int]:
    """Ids that the definition permits when sums may be off by `eps` of the whole."""
    order = sorted(range(len(logits)), key=lambda t: -logits[t])
    if how.temperature == 0:
        return {order[0]}
    best = logits[order[0]]
    weights = [math.exp((logits[t] - best) / how.temperature) for t in order]
    until = list(accumulate(weights))
    by_k = min(how.top_k or len(order), len(order))

    def kept(slack: float) -> int:
        by_p = len(order)
        if how.top_p < 1:
            needed = (how.top_p + slack) * until[by_k - 1]
            by_p = 1 + sum(mass < needed for mass in until)
        by_min = sum(w >= how.min_p * (1 - slack) for w in weights)
        return max(1, min(by_k, by_p, by_min))

    fewest, most = kept(-eps), kept(eps)
    low = how.point * until[fewest - 1] - eps * until[-1]
    high = how.point * until[most - 1] + eps * until[-1]
    starts = [0.0, *until]
    return {
        order[j] for j in range(most) if starts[j] <= high and (until[j] > low or j == fewest - 1)
    }


def check(backend, logits, rows):
    ids = draw(backend, logits, rows)
    for row, how, token in zip(logits.tolist(), rows, ids, strict=True):
        assert token in allowed(row, how), how
    return ids


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def points(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()


def matrix(size: int) -> list[How]:
    cases = product((0.3, 1.0, 2.0), (0, 1, 5, size), (1.0, 0.9, 1e-4), (0.0, 0.02, 1.0))
    chosen = [How(*case) for i, case in enumerate(cases) if i % 11 == size % 11]
    return [replace(how, point=p) for how, p in zip(chosen, points(99, size), strict=False)]


@pytest.mark.parametrize("spread", [3.0, 0.1])
@pytest.mark.parametrize("size", [1, 2, 37, 300])
def test_every_filter_at_every_size(size, spread, backend):
    rows = matrix(size)
    check(backend, noise(len(rows), size, seed=size) * spread, rows)


@pytest.mark.parametrize("grain", [0.5, 4.0, 100.0])
def test_equal_logits_stand_by_rising_id(grain, backend):
    rows = [How(point=p) for p in points(4)]
    rows += [How(top_k=9, point=p) for p in points(3, 1)] + [How(top_p=0.6, point=0.999)]
    logits = (noise(len(rows), 200) / grain).round() * grain
    check(backend, logits, rows)


def test_a_flat_row_is_its_ids_in_order(backend):
    """The place of the point is known exactly, whatever the head holds."""
    spots = [0, 63, 64, 150, 255]
    rows = [How(point=(spot + 0.5) / 256) for spot in spots]
    rows += [How(top_k=100, point=(spot + 0.5) / 100) for spot in (42, 99)]
    rows += [How(top_p=0.5, point=(spot + 0.5) / 128) for spot in (42, 127)]
    ids = draw(backend, torch.full((len(rows), 256), -2.5), rows)
    assert ids == [*spots, 42, 99, 42, 127]


def test_a_known_distribution_is_inverted(backend):
    probs = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    # falling: 1 to 0.4, 3 to 0.7, 4 to 0.85, 2 to 0.95, 0
    wanted = {0.0: 1, 0.39: 1, 0.41: 3, 0.69: 3, 0.71: 4, 0.84: 4, 0.86: 2, 0.94: 2, 0.96: 0}
    rows = [How(point=point) for point in wanted] + [How(point=math.nextafter(1, 0))]
    assert draw(backend, probs.log().expand(10, 5), rows) == [*wanted.values(), 0]
    # top-p 0.75 keeps three, the last of which stands above 0.7 / 0.85
    rows = [How(top_p=0.75, point=point) for point in (0.46, 0.48, 0.81, 0.83, 0.999)]
    assert draw(backend, probs.log().expand(5, 5), rows) == [1, 3, 3, 4, 4]
    # its share is that of the top-k mass: 0.4 of 0.7 reaches 0.55
    rows = [How(top_k=2, top_p=0.55, point=0.99), How(top_p=0.55, point=0.99)]
    assert draw(backend, probs.log().expand(2, 5), rows) == [1, 3]
    rows = [How(min_p=0.2, point=0.999), How(min_p=0.3, point=0.999)]
    assert draw(backend, probs.log().expand(2, 5), rows) == [2, 4]


def test_what_leaves_one_token_is_greedy_at_any_point(backend):
    logits = noise(10, 90)
    logits[:, 7] = logits[:, 80] = logits.max(1).values  # ties
    ways = [How(temperature=0), How(top_k=1), How(top_p=1e-4), How(temperature=1e-6, top_k=1),
            How(top_k=1, min_p=1.0)]  # fmt: skip
    rows = [replace(way, point=p) for way in ways for p in (0.0, 0.9999)]
    best = [row.index(max(row)) for row in logits.tolist()]
    assert draw(backend, logits, rows) == best


def test_a_tiny_temperature_tells_neighbours_apart(backend):
    """One ulp is a factor of e at this temperature."""
    logits = torch.full((2, 3), 10.0)
    logits[:, 1] += 2.0**-20
    rows = [How(temperature=2.0**-20, point=p) for p in (0.57, 0.58)]
    assert 0.575 < 1 / (1 + 2 / math.e) < 0.58
    assert draw(backend, logits, rows) == [1, 0]


def test_both_zeros_are_one_number(backend):
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0]]).expand(5, 4)
    rows = [How(point=p) for p in (0.1, 0.3, 0.6, 0.9)] + [How(temperature=0)]
    assert draw(backend, logits, rows) == [0, 1, 2, 3, 0]


def test_impossible_tokens_are_never_drawn(backend):
    logits = torch.full((3, 40), -math.inf)
    logits[:, 11], logits[:, 33] = 0.0, 1.0
    rows = [How(temperature=2.0, point=0.999), How(top_k=30, point=0.999), How(point=0.0)]
    assert draw(backend, logits, rows) == [11, 11, 33]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_give_minus_one(temperature, backend):
    logits = noise(5, 50)
    rows = [How(temperature, top_p=0.9, point=0.4)] * 5
    healthy = draw(backend, logits, rows)
    logits[0, 3] = math.nan
    logits[1, 49] = math.inf
    logits[2] = -math.inf
    logits[3, 1:9] = -math.inf
    logits[3, 20] = 30.0
    assert draw(backend, logits, rows) == [-1, -1, -1, 20, healthy[4]]


@pytest.mark.parametrize("values", [1e30, 1e-30])
def test_logits_of_any_size(values, backend):
    rows = [How(point=0.3), How(top_k=5, point=0.7), How(min_p=0.5, point=0.9)]
    check(backend, noise(3, 100) * values, rows)


def test_no_row_and_a_view_of_rows(backend):
    assert draw(backend, torch.empty(0, 30), []) == []
    wide = noise(4, 150, seed=2)
    rows = [How(point=p) for p in points(4)]
    wide_here = wide.to(backend.device)
    assert draw(backend, wide_here[:, 50:], rows) == draw(backend, wide[:, 50:].clone(), rows)


def test_a_token_depends_on_its_row_alone(backend, monkeypatch):
    """Not on the batch, nor on how the row is cut or how much of it a head holds."""
    rows = matrix(250)
    logits = noise(len(rows), 250, seed=5)
    together = draw(backend, logits, rows)
    assert [draw(backend, logits[i : i + 1], rows[i : i + 1])[0] for i in range(3)] == together[:3]
    for config in (SMALL, WIDE):
        monkeypatch.setattr(sampling, "draw_config", lambda config=config: config)
        assert draw(backend, logits, rows) == together


@settings(
    max_examples=25, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    logits=st.lists(
        st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, -math.inf]),
        min_size=1, max_size=100,
    ).filter(lambda row: max(row) > -math.inf),
    how=st.builds(
        How,
        temperature=st.sampled_from([0.0, 1e-6, 0.2, 0.7, 1.0, 2.0]),
        top_k=st.integers(0, 110),
        top_p=st.floats(1e-6, 1.0),
        min_p=st.floats(0.0, 1.0),
        point=st.floats(0.0, 1.0, exclude_max=True),
    ),
)  # fmt: skip
def test_any_draw_is_one_that_the_definition_permits(logits, how, backend):
    check(backend, torch.tensor([logits]), [how])


def _real(backend, size, seed=0):
    """Rows as a model gives them, few tokens far ahead of many, and rows nearly flat."""
    logits = noise(12, size, seed=seed) * torch.tensor([1.5, 3.0, 0.01]).repeat(4)[:, None]
    logits[::3, :: size // 40] += 8
    return logits.to(backend.device)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [32_064, 128_256, 151_936, 262_145])
def test_vocabularies_of_models(size, gpu):
    rows = [
        How(temperature, top_k, top_p, min_p)
        for temperature in (0.7, 1.0)
        for top_k, top_p, min_p in (
            (0, 1.0, 0.0), (50, 0.95, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.02), (5000, 0.9, 0.0),
            (9000, 1.0, 0.001),
        )
    ]  # fmt: skip
    rows = [replace(how, point=p) for how, p in zip(rows, points(12), strict=True)]
    check(gpu, _real(gpu, size), rows)


@pytest.mark.gpu
def test_runs_are_equal(gpu):
    rows = [How(1.0, top_p=0.9 if i % 2 else 1.0, point=p) for i, p in enumerate(points(12))]
    logits = _real(gpu, 151_936)
    first = draw(gpu, logits, rows)
    assert all(draw(gpu, logits, rows) == first for _ in range(100))
    assert [draw(gpu, logits[i : i + 1], rows[i : i + 1])[0] for i in range(12)] == first


@pytest.mark.gpu
def test_a_captured_draw_follows_its_inputs(gpu):
    run = gpu.op("sampling", "draw_tokens")
    names = ("temperature", "top_k", "top_p", "min_p", "points")
    still = torch.zeros(5, 12, dtype=torch.float64, device=gpu.device)
    logits = torch.zeros(12, 128_256, device=gpu.device)
    inputs = dict(zip(names, still, strict=True))
    run(logits, **inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = run(logits, **inputs)
    for seed in range(3):
        logits.copy_(_real(gpu, 128_256, seed))
        told = [[1.0] * 12, [40] * 12, [0.95] * 12, [0.01] * 12, points(12, seed)]
        still.copy_(torch.tensor(told, dtype=torch.float64))
        graph.replay()
        assert ids.tolist() == run(logits, **inputs).tolist()
        rows = [How(1.0, 40, 0.95, 0.01, point) for point in told[4]]
        assert ids.tolist() == draw(gpu, logits, rows)


@pytest.mark.gpu
def test_rows_beyond_two_billion_elements(gpu):
    logits = torch.zeros(17_000, 128_256, device=gpu.device)
    assert logits.numel() > 1 << 31
    logits[-1, 77], logits[9] = 50.0, -5.0
    logits[9, 128_255] = 30.0
    ids = draw(gpu, logits, [How(point=0.5)] * 17_000)
    assert (ids[9], ids[-1], ids[0]) == (128_255, 77, 64_128)
