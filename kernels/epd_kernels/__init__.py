"""Attention, normalisation and linear kernels: Triton on a GPU, the torch reference elsewhere."""

from __future__ import annotations

from .activations import (
    group_sums,
    quantize_fp8,
    quantize_fp8_ref,
    quantize_int8,
    quantize_int8_ref,
)
from .embed_tokens import embed_tokens, embed_tokens_ref
from .errors import FormatError
from .fp8_linear import Fp8Linear, Fp8Weight, quantize_weight_fp8
from .fused_quant import (
    add_rms_norm_quant,
    add_rms_norm_quant_ref,
    silu_mul_quant,
    silu_mul_quant_ref,
)
from .kv_codes import KVFormat, QuantKV, dequantize_kv, quantize_kv
from .kv_store import store_kv, store_kv_ref
from .linear import QuantLinear, Scheme
from .norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from .packing import Format, PackedWeight, QuantWeight, pack, quantize_weight
from .paged_attention import paged_attention, paged_attention_ref
from .quantized_attention import quantized_attention, quantized_attention_ref
from .quantized_store import HeadNorms, rope_store_kv, rope_store_kv_ref
from .rope import apply_rope, apply_rope_ref
from .sampling import draw_tokens, draw_tokens_ref
from .silu_mul import silu_mul, silu_mul_ref
from .w4_dequant import dequantize_fp8, dequantize_fp8_ref, w4a8_fp8_large
from .w4_folded import fold_scales, w4a8_fp8_folded, w4a8_fp8_folded_ref
from .w4_gemm import w4_gemm, w4_gemm_ref

__all__ = [
    "Format",
    "FormatError",
    "Fp8Linear",
    "Fp8Weight",
    "HeadNorms",
    "KVFormat",
    "PackedWeight",
    "QuantKV",
    "QuantLinear",
    "QuantWeight",
    "Scheme",
    "add_rms_norm",
    "add_rms_norm_quant",
    "add_rms_norm_quant_ref",
    "add_rms_norm_ref",
    "apply_rope",
    "apply_rope_ref",
    "dequantize_fp8",
    "dequantize_fp8_ref",
    "dequantize_kv",
    "draw_tokens",
    "draw_tokens_ref",
    "embed_tokens",
    "embed_tokens_ref",
    "fold_scales",
    "group_sums",
    "pack",
    "paged_attention",
    "paged_attention_ref",
    "quantize_fp8",
    "quantize_fp8_ref",
    "quantize_int8",
    "quantize_int8_ref",
    "quantize_kv",
    "quantize_weight",
    "quantize_weight_fp8",
    "quantized_attention",
    "quantized_attention_ref",
    "rms_norm",
    "rms_norm_ref",
    "rope_store_kv",
    "rope_store_kv_ref",
    "silu_mul",
    "silu_mul_quant",
    "silu_mul_quant_ref",
    "silu_mul_ref",
    "store_kv",
    "store_kv_ref",
    "w4_gemm",
    "w4_gemm_ref",
    "w4a8_fp8_folded",
    "w4a8_fp8_folded_ref",
    "w4a8_fp8_large",
]
