"""Embeddings and vision tokens gathered in one, row by row, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional


def _random(*shape, dtype, device, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng).to(device, dtype)


def _case(tokens, width, images, dtype, device):
    """Ids and sources of which about half are vision; what the rows must be."""
    rng = torch.Generator().manual_seed(tokens + width)
    table = _random(50, width, dtype=dtype, device=device)
    vision = _random(images, width, dtype=dtype, device=device, seed=1)
    ids = torch.randint(0, 50, (tokens,), generator=rng)
    sources = torch.full((tokens,), -1)
    if images:
        chosen = torch.randint(0, images, (tokens,), generator=rng)
        sources = torch.where(torch.rand(tokens, generator=rng) < 0.5, chosen, -1)
    rows = [
        vision[s] if s >= 0 else functional.embedding(ids[t : t + 1].to(device), table)[0]
        for t, s in enumerate(sources.tolist())
    ]
    ids[sources >= 0] = 1 << 40  # far outside the table
    want = torch.stack(rows) if rows else table[:0]
    return ids.to(device), table, vision, sources.int().to(device), want


@pytest.mark.parametrize("images", [0, 1, 21])
@pytest.mark.parametrize("width", [1, 48, 1024, 1500])
@pytest.mark.parametrize("tokens", [0, 1, 17, 63])
def test_rows_come_from_where_the_sources_say(tokens, width, images, backend):
    run = backend.op("embed_tokens", "embed_tokens")
    for dtype in backend.dtypes:
        ids, table, vision, sources, want = _case(tokens, width, images, dtype, backend.device)
        out = run(ids, table, vision, sources)
        assert out.dtype == dtype
        assert torch.equal(out, want)


def test_rows_that_nobody_names_are_never_read_into_the_result(backend):
    ids, table, vision, sources, want = _case(33, 40, 7, torch.float32, backend.device)
    text = sources < 0
    used = torch.zeros(50, dtype=torch.bool, device=backend.device)
    used[ids[text]] = True
    table[~used] = torch.nan
    seen = torch.zeros(7, dtype=torch.bool, device=backend.device)
    seen[sources[~text].long()] = True
    vision[~seen] = torch.nan
    run = backend.op("embed_tokens", "embed_tokens")
    assert torch.equal(run(ids, table, vision, sources), want)


def test_a_nan_of_a_named_row_is_kept(backend):
    table = torch.zeros(4, 8, device=backend.device)
    vision = torch.full((1, 8), torch.nan, device=backend.device)
    sources = torch.tensor([-1, 0, -1], dtype=torch.int32, device=backend.device)
    ids = torch.tensor([3, -7, 0], device=backend.device)
    out = backend.op("embed_tokens", "embed_tokens")(ids, table, vision, sources)
    assert out.isnan().all(1).tolist() == [False, True, False]


def test_tables_may_be_views(backend):
    ids, table, vision, sources, want = _case(17, 48, 5, torch.float32, backend.device)
    wide = torch.cat((torch.full_like(table, torch.nan), table), dim=1)[:, 48:]
    turned = vision.T.contiguous().T
    run = backend.op("embed_tokens", "embed_tokens")
    assert torch.equal(run(ids, wide, turned, sources), want)


@pytest.mark.gpu
def test_offsets_beyond_two_billion_elements(gpu):
    width = 16_400
    table = torch.zeros(140_000, width, dtype=torch.bfloat16, device=gpu.device)
    table[-1], table[131_000] = 1, 2
    assert table.numel() > 1 << 31
    ids = torch.tensor([139_999, 131_000, 5], device=gpu.device)
    sources = torch.full((3,), -1, dtype=torch.int32, device=gpu.device)
    out = gpu.op("embed_tokens", "embed_tokens")(ids, table, table[:0], sources)
    assert out.float().mean(1).tolist() == [1, 2, 0]


@pytest.mark.gpu
def test_a_captured_gather_follows_its_inputs(gpu):
    ids, table, vision, sources, want = _case(63, 1500, 21, torch.bfloat16, gpu.device)
    run = gpu.op("embed_tokens", "embed_tokens")
    still = [ids.clone().zero_(), sources.clone().fill_(-1)]
    run(still[0], table, vision, still[1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(still[0], table, vision, still[1])
    still[0].copy_(ids), still[1].copy_(sources)
    graph.replay()
    assert torch.equal(out, want)
