"""Whether a layer bears coded KV: its attention on a sample, with coded and with plain keys.

The sample is what the quantiser left in the checkpoint, else tokens drawn over the vocabulary. A
layer whose attention output changes by more than `LIMIT` holds its KV less coarsely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional

from epd.errors import ConfigError
from epd.kv.formats import KV_PLAIN, KV_SETTINGS
from epd.models.files import problem
from epd.models.layers import Attention, DecoderLayer
from epd.models.rope import rope_angles
from epd_kernels import KVFormat, dequantize_kv, quantize_kv

if TYPE_CHECKING:
    from epd.models.card import ModelCard
    from epd.models.decoder import Decoder

__all__ = [
    "LIMIT",
    "SAMPLE_FILE",
    "SAMPLE_TOKENS",
    "LayerCheck",
    "check_layers",
    "choose_formats",
    "coded",
]

SAMPLE_FILE = "kv_sample.safetensors"
SAMPLE_TOKENS = 256
LIMIT = 0.15
"""Largest relative change of a layer's attention output that is accepted.

Normally distributed heads of 128 channels change by 0.1 in four bits, outlying keys by several
times that.
"""

_FINER = {"int4": "fp8", "fp8": KV_PLAIN}
_log = structlog.get_logger("epd.kv")


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """What `layer` was asked to hold, the error of that, and what it holds."""

    layer: int
    asked: str
    error: float
    given: str

    @property
    def fell_back(self) -> bool:
        """Whether the layer holds something else than was asked for."""
        return self.given != self.asked


def choose_formats(
    decoder: Decoder, card: ModelCard, setting: str
) -> tuple[tuple[str, ...], tuple[LayerCheck, ...]]:
    """How each layer holds its KV under `setting`, and the checks that decided it.

    Raises `ConfigError` for an unknown setting, `CheckpointError` for a damaged sample.
    """
    if setting not in KV_SETTINGS:
        raise ConfigError(f"kv must be one of {', '.join(KV_SETTINGS)}, not {setting[:60]!r}")
    if setting == "auto":
        setting = decoder.kv_format
    layers = decoder.config.num_layers
    if setting == KV_PLAIN:
        return (KV_PLAIN,) * layers, ()
    checks = check_layers(decoder, _sample(decoder, card), setting)
    for check in checks:
        if check.fell_back:
            _log.warning(
                "a layer cannot hold its KV as asked", layer=check.layer, asked=check.asked,
                error=round(check.error, 3), given=check.given,
            )  # fmt: skip
    worst = max(check.error for check in checks)
    _log.info("kv formats", asked=setting, worst_error=round(worst, 4),
              fallbacks=sum(check.fell_back for check in checks))  # fmt: skip
    return tuple(check.given for check in checks), checks


def _sample(decoder: Decoder, card: ModelCard) -> torch.Tensor:
    """Hidden states `[T, hidden]` that enter the first layer."""
    file = card.path / SAMPLE_FILE
    if not file.is_file():
        generator = torch.Generator().manual_seed(0)
        size = min(SAMPLE_TOKENS, decoder.config.max_position)
        ids = torch.randint(decoder.config.vocab_size, (size,), generator=generator)
        return decoder.embed(ids.to(decoder.device))
    try:
        hidden = load_file(file)["hidden"]
    except (SafetensorError, OSError, KeyError) as error:
        raise _unusable(card, f"{SAMPLE_FILE} is damaged ({type(error).__name__}).") from None
    if hidden.ndim != 2 or hidden.shape[1] != decoder.config.hidden_size or not len(hidden):
        raise _unusable(card, f"{SAMPLE_FILE} holds {list(hidden.shape)} numbers.")
    sample: torch.Tensor = hidden[:SAMPLE_TOKENS].to(decoder.device, decoder.dtype)
    return sample


@torch.inference_mode()
def check_layers(
    decoder: Decoder, hidden: torch.Tensor, asked: str, limit: float = LIMIT
) -> tuple[LayerCheck, ...]:
    """One check per layer, on the sequence `hidden [T, hidden]` as plain KV lets it pass."""
    positions = torch.arange(len(hidden), device=hidden.device)
    cos, sin = rope_angles(positions, decoder.inverse_frequency, hidden.dtype)
    delta, residual = None, hidden
    checks = []
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        x, residual = layer.enter(delta, residual)
        q, k, v = layer.attention.project(x, cos, sin)
        plain = _attend(layer.attention, q, k, v)
        error, given = 0.0, asked
        while given != KV_PLAIN:
            both = coded(k, v, KVFormat(given), layer.attention.kv_factors)
            found = _attend(layer.attention, q, *both)
            change = float((found - plain).norm() / plain.norm().clamp(min=1e-30))
            error = error or change
            if change <= limit:
                break
            given = _FINER[given]
        checks.append(LayerCheck(index, asked, error, given))
        x = layer.attention.o_proj(plain.to(hidden.dtype))
        delta, residual = layer.leave(x, residual)
    return tuple(checks)


def coded(
    k: torch.Tensor, v: torch.Tensor, target: KVFormat, factors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated keys and values `[T, Hkv, D]` as their codes hold them, fp32."""
    if factors is None:
        return dequantize_kv(quantize_kv(k, target)), dequantize_kv(quantize_kv(v, target))
    held = dequantize_kv(quantize_kv(k.float() * factors, target)) / factors
    return held, dequantize_kv(quantize_kv(v, target))


def _attend(
    attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """fp32 `[T, H * D]` of one causal sequence."""
    one, two, three = (t.float().transpose(0, 1)[None] for t in (q, k, v))
    out = functional.scaled_dot_product_attention(
        one, two, three, is_causal=True, scale=attention.scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).flatten(1)


def _unusable(card: ModelCard, why: str) -> Exception:
    return problem(f"Cannot check the KV of {card.name}.", why,
                   "Quantise the model again, or serve it with kv = bf16.")  # fmt: skip
