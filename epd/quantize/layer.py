"""Quantising one decoder layer: smooth, rotate, round, measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from epd.kv.formats import KV_PLAIN
from epd.models.layouts.own import tensors_of
from epd.quantize.block import POINTS, Block, Sequences
from epd.quantize.keys import scale_keys
from epd.quantize.matrix import Rounded, as_linear, round_compensated, round_nearest
from epd.quantize.rounding import output_error
from epd.quantize.smoothing import candidates, search
from epd_kernels import Fp8Weight, KVFormat, QuantWeight, quantize_fp8, quantize_int8

if TYPE_CHECKING:
    from epd.quantize.options import QuantizeOptions

__all__ = ["LayerResult", "quantize_layer"]

_FAMILY = {"w4a16": "awq", "qqq": "qqq", "fireq": "fireq"}


@dataclass(frozen=True, slots=True, eq=False)
class LayerResult:
    """What to store, by names inside the layer; `report`; and the stream after the layer."""

    tensors: dict[str, torch.Tensor]
    report: dict[str, Any]
    hidden: torch.Tensor


def quantize_layer(
    block: Block, hidden: torch.Tensor, sequences: Sequences, options: QuantizeOptions
) -> LayerResult:
    """The layer quantised as `options` say, calibrated on `hidden [T, hidden]` entering it.

    `options` must be resolved. `hidden` of the result has passed the quantised layer, so that the
    next one is calibrated on what it will see.
    """
    wanted = block.forward(hidden, sequences)
    report: dict[str, Any] = {}
    nearest = {point: round_nearest(block.weight(point), options) for point in POINTS}
    block = block.copy()
    block.kv = None if options.kv == KV_PLAIN else KVFormat(options.kv)
    plain = rounding = _Rounding(block, nearest, options)
    baseline = result = block.forward(hidden, sequences, plain.linear)
    if not options.nearest:
        block, target = block.copy(), block.kv
        block.kv = None
        if options.rotate:
            block.rotate_values()
        if target is KVFormat.INT4:
            few = sequences.first(options.search_tokens)
            x = block.norm("qkv", hidden[: sum(few.lengths)])
            report["kv"] = scale_keys(block, x, few, target)
        if options.scheme != "fp8":
            inputs = block.inputs(hidden, sequences)
            report["smoothing"] = _smooth(block, inputs, sequences, options)
        block.kv = target
        rounding = _Rounding(block, {}, options)
        result = block.forward(hidden, sequences, rounding.linear)
    report["output_error_nearest"] = _relative(baseline - wanted, wanted)
    report["output_error"] = _relative(result - wanted, wanted)
    report["tensor_scales"] = rounding.tensor_scales
    report["layers"] = _layer_errors(plain, rounding)
    tensors = _tensors(block, rounding.weights)
    if block.kv_factors is not None:
        tensors["self_attn.kv_factors"] = block.kv_factors.contiguous()
    return LayerResult(tensors, report, result)


def _relative(difference: torch.Tensor, whole: torch.Tensor) -> float:
    return float(difference.norm() / whole.norm().clamp(min=1e-30))


def _smooth(
    block: Block, inputs: dict[str, torch.Tensor], sequences: Sequences, options: QuantizeOptions
) -> dict[str, Any]:
    """Merge factors into `block`; `o` before `qkv` and `down` before `gate_up`, which they scale.

    The error minimised is that of the point's output, after attention or SwiGLU where one follows.
    """
    few = sequences.first(options.search_tokens)
    rows, chosen = sum(few.lengths), {}
    for point in ("o", "qkv", "down", "gate_up"):
        x, weight, bias = inputs[point][:rows], block.weight(point), block.bias(point)
        wanted = block.activate(point, functional.linear(x, weight, bias), few)

        def error(
            factors: torch.Tensor, point: str = point, x: torch.Tensor = x,
            weight: torch.Tensor = weight, bias: torch.Tensor | None = bias,
            wanted: torch.Tensor = wanted,
        ) -> float:  # fmt: skip
            rounded = round_nearest(weight * factors, options).dequantize()
            y = functional.linear(_rounded_inputs(x / factors, options), rounded, bias)
            return _relative(block.activate(point, y, few) - wanted, wanted)

        family = candidates(_FAMILY[options.scheme], x, weight, options.steps)
        choice = search(family, lambda f, point=point: block.tie(point, f), error)  # type: ignore[misc]
        block.scale_inputs(point, choice.factors)
        inputs[point] = inputs[point] / choice.factors
        chosen[point] = {"parameter": choice.parameter, "before": choice.before,
                         "after": choice.after}  # fmt: skip
    return chosen


def _rounded_inputs(x: torch.Tensor, options: QuantizeOptions) -> torch.Tensor:
    """`x` as the scheme's kernel sees it."""
    if options.scheme == "w4a16":
        return x
    codes, scales = quantize_int8(x) if options.scheme == "qqq" else quantize_fp8(x)
    return codes.float() * scales[:, None]


class _Rounding:
    """Linear layers of a block in the kernels that will serve them, rounded when first met.

    Because a layer is rounded on the inputs that its rounded predecessors gave, order matters.
    """

    def __init__(self, block: Block, weights: dict[str, Rounded], options: QuantizeOptions) -> None:
        self.block = block
        self.weights = dict(weights)
        self.grams: dict[str, torch.Tensor] = {}
        self.tensor_scales: dict[str, float] = {}
        self._options = options

    def linear(self, point: str, x: torch.Tensor) -> torch.Tensor:
        """`[T, N]` of `x [T, K]`."""
        self.grams[point] = x.t() @ x
        if point not in self.weights:
            self.weights[point] = self._round(point, self.grams[point], len(x))
        served = as_linear(self.weights[point], self.block.bias(point), self._options)
        return served.forward(x)

    def _round(self, point: str, gram: torch.Tensor, tokens: int) -> Rounded:
        rounded, t = round_compensated(self.block.weight(point), gram, tokens, self._options)
        if self._options.scheme == "fireq":
            self.tensor_scales[point] = t
        return rounded


def _layer_errors(plain: _Rounding, rounding: _Rounding) -> dict[str, Any]:
    """Per stored layer: the error of its output rounded to nearest (before), and as stored (after).

    Each on the inputs that it met; only weights are rounded.
    """
    errors: dict[str, dict[str, float]] = {}
    for kind, run in (("before", plain), ("after", rounding)):
        for point, names in POINTS.items():
            dense, start = run.weights[point].dequantize(), 0
            for name in names:
                weight = run.block.tensors[f"{name}.weight"]
                rows = slice(start, start + len(weight))
                error = output_error(weight, dense[rows], run.grams[point])
                errors.setdefault(name, {})[kind] = error
                start = rows.stop
    return errors


def _tensors(block: Block, weights: dict[str, Rounded]) -> dict[str, torch.Tensor]:
    stored = {
        name: tensor.contiguous()
        for name, tensor in block.tensors.items()
        if name.rsplit(".", 1)[0] not in {n for names in POINTS.values() for n in names}
        or name.endswith(".bias")
    }
    for point, names in POINTS.items():
        start = 0
        for name in names:
            rows = slice(start, start + len(block.tensors[f"{name}.weight"]))
            for suffix, tensor in tensors_of(_rows(weights[point], rows)).items():
                stored[f"{name}.{suffix}"] = tensor
            start = rows.stop
    return stored


def _rows(weight: Rounded, rows: slice) -> Rounded:
    if isinstance(weight, Fp8Weight):
        codes = weight.codes.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
        return Fp8Weight(codes, weight.scales[rows])
    zeros = None if weight.zeros is None else weight.zeros[rows]
    return QuantWeight(weight.codes[rows], weight.scales[rows], zeros)
