"""Quantising the vision tower and the projector: module after module, on pictures.

Nothing is smoothed here. GPTQ compensates every matrix but FP8's, on inputs that the rounded
modules before it gave.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from epd.errors import ConfigError
from epd.models.files import problem
from epd.models.layouts.own import tensors_of
from epd.models.quantized_vision import vision_linears
from epd.quantize.matrix import as_linear, round_compensated, round_nearest
from epd.quantize.rounding import output_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from epd.images import RGBArray
    from epd.models.vision import VisionEncoder
    from epd.quantize.options import QuantizeOptions

__all__ = ["quantize_vision"]

_LAYER = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.out_proj",), ("mlp.fc1",), ("mlp.fc2",),
)  # fmt: skip
_PROJECTOR = (("linear_1",), ("linear_2",))
_BATCH = 8
_MULTIPLE = 16
"""The vendor's FP8 product takes no other sizes."""


def quantize_vision(
    encoder: VisionEncoder, images: list[RGBArray], options: QuantizeOptions,
    advance: Callable[[str], None] = lambda note: None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:  # fmt: skip
    """Tensors by canonical name, and the report; the linear layers of `encoder` are replaced.

    `images` calibrate it. Raises `ConfigError` where there are none.
    """
    if not images:
        raise ConfigError("Cannot quantise the vision side.\nNo calibration sample has a picture.\n"
                          "Calibrate on pictures, or leave the vision side plain.")  # fmt: skip
    names = {linear: name for name, linear in vision_linears(encoder.parts).items()}
    before = encoder.encode(images, batch_size=_BATCH)
    run = _Run(options, names)
    states = encoder.entering(images, batch_size=_BATCH)
    for index, layer in enumerate(encoder.layers):
        advance(f"vision layer {index}")
        states = run.module(f"layer {index}", layer, _LAYER, states,
                            lambda m, x: m(x, attention_mask=None))  # fmt: skip
    advance("projector")
    features = encoder.encode_inputs(images, frozenset({"encoder_states"}), batch_size=_BATCH)
    states = [inputs.encoder_states for inputs in features]  # type: ignore[misc]
    run.module("projector", encoder.projector, _PROJECTOR, states, lambda m, x: m(x))
    after = encoder.encode(images, batch_size=_BATCH)
    report = {"token_error": _relative(after, before), "modules": run.report, "kept": run.kept}
    return run.tensors, report


class _Run:
    """Rounds modules one by one, and gathers what to store and to report."""

    def __init__(self, options: QuantizeOptions, names: dict[nn.Linear, str]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.report: dict[str, Any] = {}
        self.kept: list[str] = []
        self._options = options
        self._names = names

    def module(
        self, label: str, module: nn.Module, points: tuple[tuple[str, ...], ...],
        batches: list[torch.Tensor], call: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    ) -> list[torch.Tensor]:  # fmt: skip
        """What leaves `module`, now quantised; `points` group its linear layers by their input."""
        wanted = [call(module, batch) for batch in batches]
        nearest, errors = deepcopy(module), {}
        for point in points:
            gram, tokens = _gram(module, point[0], lambda: [call(module, b) for b in batches])
            for name in point:
                rounded = self._linear(module, nearest, name, gram, tokens)
                errors.update(rounded)
        found = [call(module, batch) for batch in batches]
        rough = [call(nearest, batch) for batch in batches]
        self.report[label] = {
            "output_error_nearest": _relative(rough, wanted),
            "output_error": _relative(found, wanted), "layers": errors,
        }  # fmt: skip
        return found

    def _linear(
        self, module: nn.Module, nearest: nn.Module, name: str, gram: torch.Tensor, tokens: int
    ) -> dict[str, dict[str, float]]:
        """Replace one linear layer, here and in `nearest`; its errors, nothing if it stays."""
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        stored, weight, bias = self._names[linear], linear.weight.detach(), linear.bias
        if not bool(weight.isfinite().all()):
            raise problem(
                "Cannot quantise the vision side.",
                f"Tensor {stored}.weight: expected finite numbers, found NaN or infinity.",
                "Repair or download the checkpoint again.",
            )
        if any(size % _MULTIPLE for size in weight.shape):
            self.kept.append(stored)
            return {}
        plain = round_nearest(weight, self._options)
        chosen = plain
        if not self._options.nearest:
            chosen, _ = round_compensated(weight, gram, tokens, self._options)
        for target, rounded in ((nearest, plain), (module, chosen)):
            target.set_submodule(name, as_linear(rounded, bias, self._options))
        for suffix, tensor in tensors_of(chosen).items():
            self.tensors[f"{stored}.{suffix}"] = tensor
        sizes = {"before": output_error(weight, plain.dequantize(), gram),
                 "after": output_error(weight, chosen.dequantize(), gram)}  # fmt: skip
        return {name: sizes}


def _gram(module: nn.Module, name: str, run: Callable[[], object]) -> tuple[torch.Tensor, int]:
    """The sum of x x^T over what enters a linear layer while `run` runs, and how many x."""
    seen: list[torch.Tensor] = []
    counts: list[int] = []

    def record(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)
        seen[:] = [x.t() @ x + (seen[0] if seen else 0)]
        counts.append(len(x))

    handle = module.get_submodule(name).register_forward_pre_hook(record)
    try:
        run()
    finally:
        handle.remove()
    return seen[0], sum(counts)


def _relative(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    pairs = list(zip(found, wanted, strict=True))
    wrong = sum(float((one - other).square().sum()) for one, other in pairs)
    return float((wrong / max(sum(float(w.square().sum()) for _, w in pairs), 1e-30)) ** 0.5)
