"""Rotary angles: RoFormer (arXiv 2104.09864), linear interpolation (arXiv 2306.15595), and the
frequency-banded stretch that Llama 3.1 was released with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from epd.models.text_config import RopeConfig

__all__ = ["inverse_frequencies", "rope_angles"]


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each channel pair, fp32 `[head_dim / 2]`.

    theta^(-2i/d), divided by `factor` for the linear type. The llama3 type divides only waves
    longer than original/low, keeps those shorter than original/high, and interpolates between.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequency = 1.0 / (config.theta**exponent)
    if config.type == "linear":
        return frequency / config.factor
    if config.type == "llama3":
        return _llama3(config, frequency)
    return frequency


def _llama3(config: RopeConfig, frequency: torch.Tensor) -> torch.Tensor:
    turns = config.original_max_position * frequency / (2 * math.pi)
    width = config.high_freq_factor - config.low_freq_factor
    keep = ((turns - config.low_freq_factor) / width).clamp(0.0, 1.0)
    return (1 - keep) * frequency / config.factor + keep * frequency


def rope_angles(
    positions: torch.Tensor, frequency: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine `[T, head_dim]` of `positions [T]`, computed in fp32, given in `dtype`."""
    angle = positions.float()[:, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)
