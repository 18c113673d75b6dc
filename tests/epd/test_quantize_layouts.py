"""Loaders of stored layouts, fed by packers written here from each format's definition."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from epd.errors import CheckpointError
from epd.models.checkpoint import Checkpoint
from epd.models.files import read_header
from epd.models.layouts import is_quantized, read_linear
from epd.models.layouts.own import tensors_of
from epd.models.layouts.source import LayerSource
from epd.models.quantization import Quantization
from epd_kernels import QuantWeight, quantize_weight, quantize_weight_fp8

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_N, _K = 64, 256


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Any]:
    """The stored layer that tensors of one make, as `[_N, _K]` or another shape."""

    def run(
        tensors: dict[str, torch.Tensor], *, rows: int = _N, width: int = _K, **told: Any
    ) -> Any:
        file = tmp_path / "model.safetensors"
        save_file({f"layer.{k}": v.contiguous() for k, v in tensors.items()}, file)
        card: Any = SimpleNamespace(path=tmp_path, name="tiny", entries=read_header(file))
        facts = Quantization(method="any", scheme="w4a16", **told)
        with Checkpoint(card) as checkpoint:
            source = LayerSource(
                checkpoint=checkpoint, prefix="layer", rows=rows, width=width, quantization=facts
            )
            assert is_quantized(source)
            return read_linear(source)

    return run


def _codes(seed: int = 0, rows: int = _N, width: int = _K) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (rows, width), generator=generator)


def _scales(groups: int, seed: int = 1, rows: int = _N) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, groups, generator=generator) + 0.1).half()


def _words(rows: list[list[int]]) -> torch.Tensor:
    """int32 `[R, C / 8]` of values 0..15 `[R, C]`: the first of eight in the lowest bits."""
    packed = []
    for row in rows:
        words = []
        for start in range(0, len(row), 8):
            word = 0
            for place, value in enumerate(row[start : start + 8]):
                word |= value << (4 * place)
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        packed.append(words)
    return torch.tensor(packed, dtype=torch.int32)


def _dense(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """w = (code - zero) * scale, entry by entry."""
    size = codes.shape[1] // scales.shape[1]
    spread = scales.float().repeat_interleave(size, 1)
    shift = 0 if zeros is None else zeros.float().repeat_interleave(size, 1)
    return (codes.float() - shift) * spread


# --- ours


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, _K])
def test_our_layout_gives_the_weight_back(
    read: Callable[..., Any], group_size: int, symmetric: bool
) -> None:
    weight = torch.randn(_N, _K, generator=torch.Generator().manual_seed(0))
    stored = quantize_weight(weight, group_size=group_size, symmetric=symmetric)
    got = read({**tensors_of(stored), "bias": torch.arange(_N).half()})
    assert torch.equal(got.weight.codes, stored.codes)
    assert torch.equal(got.weight.scales, stored.scales)
    assert torch.equal(got.weight.dequantize(), stored.dequantize())
    assert torch.equal(got.bias, torch.arange(_N).half())


def test_our_layout_holds_two_codes_per_byte(read: Callable[..., Any]) -> None:
    stored = tensors_of(QuantWeight(_codes().to(torch.int8), _scales(2).float()))
    assert stored["weight_codes"].shape == (_N, _K // 2)
    byte = int(stored["weight_codes"][5, 9])
    assert [byte & 15, byte >> 4] == [int(code) & 15 for code in _codes()[5, 18:20]]


def test_fp8_weights_come_back_bit_for_bit(read: Callable[..., Any]) -> None:
    weight = quantize_weight_fp8(torch.randn(_N, _K))
    got = read(tensors_of(weight)).weight
    assert torch.equal(got.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert torch.equal(got.scales, weight.scales)


# --- compressed-tensors


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_pack_quantized(read: Callable[..., Any], groups: int) -> None:
    codes, scales = _codes(), _scales(groups)
    packed = _words((codes + 8).tolist())
    got = read({"weight_packed": packed, "weight_scale": scales,
                "weight_shape": torch.tensor([_N, _K])})  # fmt: skip
    assert torch.equal(got.weight.dequantize(), _dense(codes, scales, None))


def test_pack_quantized_with_zeros_packed_along_rows(read: Callable[..., Any]) -> None:
    codes, scales, zeros = _codes(), _scales(2), _codes(2, _N, 2)
    packed_zeros = _words((zeros + 8).t().tolist()).t()
    got = read({"weight_packed": _words((codes + 8).tolist()), "weight_scale": scales,
                "weight_zero_point": packed_zeros})  # fmt: skip
    assert torch.equal(got.weight.dequantize(), _dense(codes, scales, zeros))


def test_unpacked_integers(read: Callable[..., Any]) -> None:
    codes, scales = _codes(), _scales(2)
    got = read({"weight": codes.to(torch.int8), "weight_scale": scales})
    assert torch.equal(got.weight.dequantize(), _dense(codes, scales, None))


@pytest.mark.parametrize("shape", [(1,), (_N, 1)])
def test_float_quantized(read: Callable[..., Any], shape: tuple[int, ...]) -> None:
    weight = torch.randn(_N, _K).to(torch.float8_e4m3fn)
    scale = torch.rand(shape).bfloat16() + 0.5
    got = read({"weight": weight, "weight_scale": scale, "input_scale": torch.ones(1)})
    assert torch.equal(got.weight.dequantize(), weight.float() * scale.float().view(-1, 1))


# --- GPTQ


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
def test_gptq(read: Callable[..., Any], version: int, groups: int) -> None:
    u, scales = _codes() + 8, _scales(groups)
    zeros = torch.randint(1, 16, (_N, groups), generator=torch.Generator().manual_seed(4))
    stored = zeros - 1 if version == 1 else zeros
    got = read(
        {
            "qweight": _words(u.tolist()).t(),
            "qzeros": _words(stored.t().tolist()),
            "scales": scales.t(),
            "g_idx": (torch.arange(_K) // (_K // groups)).int(),
        },
        zero_offset=int(version == 1),
    )
    assert torch.equal(got.weight.dequantize(), _dense(u, scales, zeros))


def test_symmetric_gptq_needs_no_zeros(read: Callable[..., Any]) -> None:
    u, scales = _codes() + 8, _scales(2)
    sevens = _words([[7] * _N] * 2)
    got = read({"qweight": _words(u.tolist()).t(), "qzeros": sevens, "scales": scales.t()},
               zero_offset=1)  # fmt: skip
    assert got.weight.zeros is None
    assert torch.equal(got.weight.dequantize(), _dense(u, scales, torch.full((_N, 2), 8)))


# --- AWQ


def test_awq(read: Callable[..., Any]) -> None:
    u, scales = _codes() + 8, _scales(2)
    zeros = torch.randint(0, 16, (_N, 2), generator=torch.Generator().manual_seed(5))

    def interleaved(values: torch.Tensor) -> torch.Tensor:
        rows = [
            [row[start + place] for start in range(0, _N, 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
            for row in values.t().tolist()
        ]
        return _words(rows)

    got = read({"qweight": interleaved(u), "qzeros": interleaved(zeros), "scales": scales.t()})
    assert torch.equal(got.weight.dequantize(), _dense(u, scales, zeros))


# --- QQQ


def _qqq_words(nibbles: torch.Tensor, *, grouped: bool) -> torch.Tensor:
    """`B` of nibbles `[N, K]`, element by element from where each one goes."""
    order = (0, 2, 4, 6, 1, 3, 5, 7) if grouped else (4, 0, 5, 1, 6, 2, 7, 3)
    by_input = nibbles.t().tolist()
    lines = []
    for tile_row in range(0, _K, 16):
        flat = [
            by_input[tile_row + i][tile_column + j]
            for tile_column in range(0, _N, 16)
            for i in range(16)
            for j in range(16)
        ]
        line = []
        for run in range(0, len(flat), 1024):
            for lane in range(32):
                for tile in range(4):
                    eight = [
                        run + 256 * tile + 16 * (4 * (lane % 4) + i) + lane // 4 + 8 * half
                        for half in (0, 1)
                        for i in range(4)
                    ]
                    line += [flat[eight[place]] for place in order]
        lines.append(line)
    return _words(lines)


def _in_fragments(row: list[float], block: int, places: list[int]) -> list[float]:
    return [row[s + p] for s in range(0, len(row), block) for p in places]


_CHANNELS = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def test_qqq_per_group(read: Callable[..., Any]) -> None:
    codes, groups = _codes(), _scales(2)
    channel = torch.rand(_N, generator=torch.Generator().manual_seed(6)) + 0.5
    places = [i + 8 * j for i in range(8) for j in range(8)]
    got = read({
        "B": _qqq_words(codes + 8, grouped=True),
        "s_group": torch.tensor(
            [_in_fragments(row, 64, places) for row in groups.t().tolist()], dtype=torch.float16
        ),
        "s_channel": torch.tensor([_in_fragments(channel.tolist(), 32, _CHANNELS)]),
        "workspace": torch.zeros(16, dtype=torch.int32),
    })  # fmt: skip
    torch.testing.assert_close(
        got.weight.dequantize(), _dense(codes, groups.float() * channel[:, None], None)
    )


def test_qqq_per_channel(read: Callable[..., Any]) -> None:
    codes = _codes()
    channel = torch.rand(_N, generator=torch.Generator().manual_seed(7)) + 0.5
    got = read({
        "B": _qqq_words(codes & 15, grouped=False),
        "s_group": torch.empty(0, dtype=torch.float16),
        "s_channel": torch.tensor([_in_fragments((channel / 16).tolist(), 32, _CHANNELS)]),
    })  # fmt: skip
    torch.testing.assert_close(got.weight.dequantize(), _dense(codes, channel[:, None], None))


# --- refusals: each names the tensor, what was expected and what is there


def _gptq(**change: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {
        "qweight": _words((_codes() + 8).tolist()).t(), "qzeros": _words([[8] * _N] * 2),
        "scales": _scales(2).t(),
    }  # fmt: skip
    return {**tensors, **change}


def _own(**change: torch.Tensor) -> dict[str, torch.Tensor]:
    weight = QuantWeight(_codes().to(torch.int8), _scales(2).float())
    return {**tensors_of(weight), **change}


_SHUFFLED = torch.arange(_K).flip(0) // 128
_REFUSED = {
    "act-order": (_gptq(g_idx=_SHUFFLED.int()), r"g_idx.*activation order"),
    "packed act-order": (
        {"weight_packed": _words((_codes() + 8).tolist()), "weight_scale": _scales(2),
         "weight_g_idx": _SHUFFLED.int()},
        r"weight_g_idx.*activation order",
    ),
    "gptq groups": (
        _gptq(scales=_scales(3).t(), qzeros=_words([[8] * _N] * 3)),
        r"scales.*divides K = 256.*3 groups",
    ),
    "gptq zeros": (_gptq(qzeros=_words([[8] * _N] * 4)), r"qzeros.*\[2, 8\].*\[4, 8\]"),
    "gptq nan": (_gptq(scales=torch.full((2, _N), float("nan")).half()), r"scales.*NaN"),
    "gptq dtype": (_gptq(qzeros=torch.zeros(2, 8)), r"qzeros.*int32.*float32"),
    "gptq shape": (
        _gptq(qweight=torch.zeros(16, _N, dtype=torch.int32)), r"qweight.*\[32, 64\].*\[16, 64\]"
    ),
    "own infinity": (_own(weight_scales=torch.full((_N, 2), float("inf"))), r"scales.*infinity"),
    "own group of 16": (_own(weight_scales=torch.ones(_N, 16)), r"32, 64, 128.*groups of 16"),
    "own shape": (
        _own(weight_codes=torch.zeros(_N, 4, dtype=torch.uint8)), r"\[64, 128\].*\[64, 4\]"
    ),
    "eight bits": (
        {"weight": torch.full((_N, _K), 99, dtype=torch.int8), "weight_scale": torch.ones(_N, 2)},
        r"weight.*-8\.\.7.*eight-bit",
    ),
    "fp8 nan": (
        {"weight": torch.full((_N, _K), float("nan")).to(torch.float8_e4m3fn),
         "weight_scale": torch.ones(_N, 1)},
        r"layer\.weight.*NaN",
    ),
    "fp8 blocks": (
        {"weight": torch.zeros(_N, _K).to(torch.float8_e4m3fn), "weight_scale": torch.ones(2, 2)},
        r"weight_scale.*\[64, 1\].*\[2, 2\]",
    ),
    "said shape": (
        {"weight_packed": _words((_codes() + 8).tolist()), "weight_scale": _scales(2),
         "weight_shape": torch.tensor([_N, 2 * _K])},
        r"weight_shape.*\[64, 256\].*\[64, 512\]",
    ),
    "missing": ({"qweight": torch.zeros(32, _N, dtype=torch.int32)}, r"layer\.scales is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(_REFUSED))
def test_what_is_refused_is_named(read: Callable[..., Any], case: str) -> None:
    tensors, named = _REFUSED[case]
    with pytest.raises(CheckpointError) as raised:
        read(tensors)
    assert re.search(named, str(raised.value), re.DOTALL), str(raised.value)
    assert str(raised.value).count("\n") == 2


def test_a_declared_order_that_is_not_stored_is_refused(read: Callable[..., Any]) -> None:
    natural = (torch.arange(_K) // 128).int()
    assert read(_gptq(g_idx=natural), act_order=True).weight.group_size == 128
    with pytest.raises(CheckpointError, match=r"layer\.g_idx: expected the order that desc_act"):
        read(_gptq(), act_order=True)
