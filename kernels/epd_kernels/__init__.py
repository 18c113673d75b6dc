"""Attention, normalisation and linear kernels: Triton on a GPU, the torch reference elsewhere."""

from __future__ import annotations

from .errors import FormatError
from .kv_store import store_kv, store_kv_ref
from .norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from .paged_attention import paged_attention, paged_attention_ref
from .rope import apply_rope, apply_rope_ref
from .silu_mul import silu_mul, silu_mul_ref

__all__ = [
    "FormatError",
    "add_rms_norm",
    "add_rms_norm_ref",
    "apply_rope",
    "apply_rope_ref",
    "paged_attention",
    "paged_attention_ref",
    "rms_norm",
    "rms_norm_ref",
    "silu_mul",
    "silu_mul_ref",
    "store_kv",
    "store_kv_ref",
]
