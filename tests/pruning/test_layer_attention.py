"""Tiled attention scores against one eager fp32 attention map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epd_pruning.attention import attention_lse, received_and_given, weighted_attention

SHAPES = [(1, 1, 6, 5), (4, 2, 40, 17), (8, 1, 300, 140), (6, 6, 260, 1)]
IDS = [f"H{h}-KV{kv}-V{v}-T{t}" for h, kv, v, t in SHAPES]


def problem(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries of every row, keys, vision rows 3 … and text rows with a row between and after."""
    heads, kv_heads, num_vision, num_text = shape
    generator = torch.Generator().manual_seed(sum(shape))
    length = 3 + num_vision + 2 + num_text
    queries = torch.randn(heads, length, 8, generator=generator) * 1.5
    keys = torch.randn(kv_heads, length, 8, generator=generator) * 1.5
    return queries, keys, 3 + torch.arange(num_vision), 5 + num_vision + torch.arange(num_text)


def eager(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The whole causal attention map [H, L, L]."""
    keys = keys.repeat_interleave(queries.shape[0] // keys.shape[0], dim=0)
    logits = queries @ keys.mT * scale
    causal = torch.ones(logits.shape[1:], dtype=torch.bool).tril()
    return logits.masked_fill(~causal, -torch.inf).softmax(-1)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_rows_rebuilt_from_their_log_sum_exp_sum_to_one(shape: tuple[int, int, int, int]) -> None:
    queries, keys, _, text = problem(shape)
    lse = attention_lse(queries[:, text], keys, text, 0.3)
    repeated = keys.repeat_interleave(shape[0] // shape[1], dim=0)
    rows = torch.exp(queries[:, text] @ repeated.mT * 0.3 - lse[:, :, None])
    rows = rows.masked_fill(torch.arange(keys.shape[1]) > text[:, None], 0)
    torch.testing.assert_close(rows, eager(queries, keys, 0.3)[:, text], rtol=1e-4, atol=1e-6)
    assert bool(((rows.sum(-1) - 1).abs() < 1e-5).all())


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_prior_is_the_column_sum_of_the_symmetrised_map(shape: tuple[int, int, int, int]) -> None:
    queries, keys, _, text = problem(shape)
    block = eager(queries, keys, 0.3)[:, text][:, :, text]
    symmetric = block + block.mT - torch.diag_embed(block.diagonal(dim1=1, dim2=2))
    lse = attention_lse(queries[:, text], keys, text, 0.3)
    found = received_and_given(queries[:, text], keys, text, lse, 0.3)
    torch.testing.assert_close(found, symmetric.sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_scores_are_weighted_columns_of_the_map(shape: tuple[int, int, int, int]) -> None:
    queries, keys, vision, text = problem(shape)
    weights = torch.rand(shape[0], shape[3], generator=torch.Generator().manual_seed(9))
    expected = (weights[:, :, None] * eager(queries, keys, 0.3)[:, text][:, :, vision]).sum((0, 1))
    lse = attention_lse(queries[:, text], keys, text, 0.3)
    found = weighted_attention(queries[:, text], keys, vision, lse, weights, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_half_precision_queries_are_scored_in_fp32() -> None:
    queries, keys, vision, text = problem(SHAPES[1])
    queries, keys = queries.half(), keys.half()
    lse = attention_lse(queries[:, text], keys, text, 0.3)
    weights = torch.ones_like(lse)
    found = weighted_attention(queries[:, text], keys, vision, lse, weights, 0.3)
    wide = weighted_attention(queries[:, text].float(), keys.float(), vision, lse, weights, 0.3)
    assert lse.dtype == found.dtype == torch.float32
    assert torch.equal(found, wide)
