"""Decoding by single warps: its assembly executed lane by lane, and on a GPU as it is launched."""

from __future__ import annotations

import builtins
import importlib

import numpy as np
import pytest
import torch

from epd_kernels import KVFormat, quantized_attention
from epd_kernels.launch import INTERPRETED, attention_splits, tl
from epd_kernels.quantized_attention import CodedConfig, quantized_attention_triton
from epd_kernels.warp_decode import WarpConfig, fits_warps

from .coded_batches import CodedBatch, dense, poisoned_cache
from .ptx_lanes import execute

CASES = [
    {"seqs": ((1, 70), (1, 33), (1, 1), (1, 0), (0, 9))},
    {"seqs": ((1, 31), (1, 48)), "dim": 64, "heads": 8, "kv_heads": 1, "block": 32},
    {"seqs": ((1, 17), (1, 64)), "heads": 3, "kv_heads": 1, "block": 48},
    {"seqs": ((1, 20),), "dim": 64, "heads": 7, "kv_heads": 1},
]
RATIO = {torch.float32: 1e-3, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}


class Call:
    """What the interpreter asks for the results of an asm block."""

    def __init__(self, results):
        self.get_result = results.__getitem__


@pytest.fixture
def device(request, monkeypatch):
    """The GPU, or a CPU whose interpreter hands assembly to `ptx_lanes`."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return "cuda"
    if tl is None or not INTERPRETED:
        pytest.skip("kernels are not interpreted here")
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def create(self, asm, constraints, values, types, pure, pack):
        raw = [np.ascontiguousarray(v.data) for v in values]
        raw = [v if v.dtype.itemsize == 8 else v.view(np.uint32) for v in raw]
        kinds = {"=f": (np.float32, tl.float32), "=r": (np.int32, tl.int32)}
        found = zip(constraints.split(","), execute(asm, constraints, raw), strict=False)
        return Call([
            interpreter.TensorHandle(value.view(kinds[kind][0]), kinds[kind][1])
            for kind, value in found
        ])  # fmt: skip

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create)
    # the compiler adds its tuples to Python's, the interpreter leaves that to Python
    monkeypatch.setattr(
        tl.tuple, "__radd__", lambda self, other: other + builtins.tuple(self.values),
        raising=False,
    )  # fmt: skip
    return "cpu"


DEVICES = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double().cpu() - expected).norm()
    bound = RATIO[actual.dtype] * expected.norm() + 1e-30
    assert error <= bound, float(error / expected.norm())


def batch_of(device: str, dtype: torch.dtype = torch.float32, **case) -> CodedBatch:
    return CodedBatch(KVFormat.INT4, dtype, device, **{"dim": 128, **case})


@DEVICES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_dense(case, device):
    """Unused slots and table entries are NaN or lead to NaN."""
    batch = batch_of(device, **case)
    close(quantized_attention_triton(*batch.args, **batch.options, config=WarpConfig()),
          dense(batch))  # fmt: skip


@DEVICES
def test_splits_and_limits(device):
    """Splits that hold nothing, one that ends within a tile, and rows bounded before the end."""
    batch = batch_of(device, seqs=((1, 300), (1, 5), (1, 270)), heads=2, kv_heads=1, dim=64)
    config = WarpConfig()
    assert attention_splits(torch.device("cpu"), programs=3, max_seqlen_k=300,
                            occupancy=config.occupancy, num_warps=1) == 2  # fmt: skip
    limits = torch.tensor([130, 9, 0], dtype=torch.int32)
    for bound in (None, limits):
        given = None if bound is None else bound.to(device)
        out = quantized_attention_triton(*batch.args, **batch.options, config=config, limits=given)
        close(out, dense(batch, bound))


@DEVICES
def test_four_groups_per_step_and_head_major_memory(device):
    batch = batch_of(device, seqs=((1, 70), (1, 130)), heads=8, kv_heads=2, dim=64)
    q, *caches = batch.args
    swapped = [
        type(c)(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in c)) for c in caches
    ]
    out = quantized_attention_triton(q, *swapped, **batch.options, config=WarpConfig(groups=4))
    close(out, dense(batch))


@DEVICES
def test_small_and_large_values_keep_their_accuracy(device):
    for sizes in ((1e-3, 1e3, 1e-4), (3e3, 1e-3, 2e2), (1.0, 1.0, 1e-5)):
        batch = batch_of(device, seqs=((1, 50),), heads=2, kv_heads=1, dim=64, sizes=sizes)
        out = quantized_attention_triton(*batch.args, **batch.options, config=WarpConfig())
        close(out, dense(batch))


def test_what_a_warp_can_read():
    """Four bits, heads of 64 or 128 channels, blocks of whole groups of 16, up to eight queries."""
    wanted = poisoned_cache(KVFormat.INT4, 2, 16, 2, 128)
    assert fits_warps(wanted, 8) and not fits_warps(wanted, 9)
    assert not fits_warps(poisoned_cache(KVFormat.FP8, 2, 16, 2, 128), 4)
    assert not fits_warps(poisoned_cache(KVFormat.INT4, 2, 8, 2, 128), 4)
    assert not fits_warps(poisoned_cache(KVFormat.INT4, 2, 16, 2, 80), 4)
    shifted = wanted._replace(codes=torch.zeros(wanted.codes.numel() + 8, dtype=torch.uint8)[8:]
                              .view(wanted.codes.shape))  # fmt: skip
    assert not fits_warps(shifted, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_long_contexts_equal_the_tiles(device, dtype, dim):
    """What is launched by itself, against the kernel that goes through shared memory."""
    batch = batch_of(device, dtype, seqs=tuple((1, n) for n in (1, 127, 1000, 4097)), heads=32,
                     kv_heads=8, dim=dim)  # fmt: skip
    tiles = CodedConfig(16, 128, 4, 3)
    expected = quantized_attention_triton(*batch.args, **batch.options, config=tiles)
    first = quantized_attention(*batch.args, **batch.options)
    close(first, expected.double().cpu())
    for _ in range(20):
        assert torch.equal(quantized_attention(*batch.args, **batch.options), first)
