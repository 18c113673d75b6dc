"""Scores of FP8 queries and keys against fp64 attention of the rounded queries."""

from __future__ import annotations

import pytest
import torch

from epd_kernels import KVFormat, quantized_attention
from epd_kernels.errors import FormatError
from epd_kernels.fp8_scores import attend_fp8_scores, rounded_queries

from .coded_batches import CodedBatch, dense

KERNELS = pytest.mark.parametrize(
    "backend", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True
)
CASES = [
    {"seqs": ((1, 1), (17, 17), (35, 35))},
    {"seqs": ((16, 32), (1, 16), (15, 31), (2, 17))},
    {"seqs": ((5, 40), (33, 33), (1, 48)), "heads": 8, "kv_heads": 2, "block": 8, "dim": 64},
    {"seqs": ((3, 1), (2, 5), (2, 0), (0, 7))},
    {"seqs": ((18, 50),), "heads": 6, "kv_heads": 2, "dim": 80},
]
RATIO = {torch.float32: 1e-4, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}


def rounded(batch: CodedBatch) -> CodedBatch:
    """The same batch as the definition sees it, its queries rounded."""
    batch.q = rounded_queries(batch.q).double()
    return batch


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30))


@KERNELS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_dense_with_rounded_queries(case, backend):
    for dtype in backend.dtypes[:2] if backend.name == "interpreter" else backend.dtypes[1:]:
        batch = CodedBatch(KVFormat.FP8, dtype, backend.device, **case)
        out = attend_fp8_scores(*batch.args, **batch.options)
        assert distance(out, dense(rounded(batch))) <= RATIO[dtype]


@KERNELS
def test_limits_bound_what_is_seen(backend):
    batch = CodedBatch(KVFormat.FP8, torch.float16, backend.device, CASES[1]["seqs"])
    limits = torch.randint(-2, 40, (len(batch.q),), dtype=torch.int32,
                           generator=torch.Generator().manual_seed(5))  # fmt: skip
    out = attend_fp8_scores(*batch.args, **batch.options, limits=limits.to(backend.device))
    assert distance(out, dense(rounded(batch), limits)) <= RATIO[torch.float16]


@pytest.mark.parametrize(
    "backend", ["ref", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True
)
def test_it_is_an_option_for_many_queries_over_fp8(backend):
    device = backend.device
    batch = CodedBatch(KVFormat.FP8, torch.float32, device, ((256, 260),))
    plain = quantized_attention(*batch.args, **batch.options)
    coarse = quantized_attention(*batch.args, **batch.options, fp8_scores=True)
    assert 1e-3 < distance(coarse, plain.double().cpu()) < 0.05
    few = CodedBatch(KVFormat.FP8, torch.float32, device, ((255, 260),))
    assert torch.equal(quantized_attention(*few.args, **few.options, fp8_scores=True),
                       quantized_attention(*few.args, **few.options))  # fmt: skip
    four = CodedBatch(KVFormat.INT4, torch.float32, device, ((1, 140),))
    with pytest.raises(FormatError, match="fp8_scores"):
        quantized_attention(*four.args, **four.options, fp8_scores=True)


@pytest.mark.parametrize(("outlying", "most"), [(1.0, 0.03), (8.0, 0.06)])
def test_what_rounding_the_queries_costs(outlying, most):
    """Against exact queries over the same codes, keys with and without outlying channels."""
    torch.manual_seed(0)
    tokens, dim = 256, 128
    q, k, v = (torch.randn(4, tokens, dim, dtype=torch.float64) for _ in "qkv")
    k[..., ::32] *= outlying
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    attend = torch.nn.functional.scaled_dot_product_attention
    exact = attend(q, k, v, attn_mask=mask)
    coarse = attend(rounded_queries(q).double(), k, v, attn_mask=mask)
    assert 0.002 < distance(coarse, exact) < most
