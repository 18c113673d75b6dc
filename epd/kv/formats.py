"""Names of how a layer's KV is held, and how wide a row is when it moves. Imports no torch."""

from __future__ import annotations

__all__ = ["KV_CODED", "KV_PLAIN", "KV_SETTINGS", "row_bytes", "row_width"]

KV_PLAIN = "bf16"
"""Keys and values in the dtype of the model, which on a GPU is bfloat16."""

KV_CODED = ("fp8", "int4")
KV_SETTINGS = ("auto", KV_PLAIN, *KV_CODED)
"""What may be asked for; `auto` is what the checkpoint was quantised for, or plain."""

_SCALE_BYTES = 4


def row_width(kind: str, head_dim: int) -> int:
    """Numbers per token and KV head in a moved row: channels, or bytes of codes and scale."""
    if kind == KV_PLAIN:
        return head_dim
    return (head_dim // 2 if kind == "int4" else head_dim) + _SCALE_BYTES


def row_bytes(kind: str, head_dim: int, itemsize: int) -> int:
    """Bytes per token and KV head, `itemsize` being that of the model's dtype."""
    return row_width(kind, head_dim) * (itemsize if kind == KV_PLAIN else 1)
