"""The LM head in FP8: rounded to nearest, a scale per row, a few thousand rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from epd.models.files import problem
from epd_kernels import quantize_weight_fp8, rms_norm

if TYPE_CHECKING:
    from epd.models.checkpoint import Checkpoint
    from epd.models.text_config import DecoderConfig

__all__ = ["EMBED", "HEAD", "quantize_head"]

HEAD = "lm_head.weight"
EMBED = "language_model.embed_tokens.weight"
_ROWS = 8192


def quantize_head(
    checkpoint: Checkpoint, config: DecoderConfig, hidden: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """`weight` and `weight_scale` of the head, and the relative error of its scores.

    `hidden [T, hidden]` has left the last layer. A head tied to the embedding is made from that.
    Raises `CheckpointError` for a weight that is not finite.
    """
    name = HEAD if HEAD in checkpoint else EMBED
    head = checkpoint.tensor(name, (config.vocab_size, config.hidden_size))
    norm = checkpoint.tensor("language_model.norm.weight").float()
    x = rms_norm(hidden, norm, config.rms_norm_eps)
    gram = x.t() @ x
    codes, scales, wrong, whole = [], [], 0.0, 0.0
    for start in range(0, len(head), _ROWS):
        rows = head[start : start + _ROWS].float()
        if not bool(rows.isfinite().all()):
            raise problem("Cannot quantise the head.",
                          f"Tensor {name}: expected finite numbers, found NaN or infinity.",
                          "Repair or download the checkpoint again.")  # fmt: skip
        rounded = quantize_weight_fp8(rows)
        difference = rounded.dequantize() - rows
        wrong += float((difference @ gram * difference).sum())
        whole += float((rows @ gram * rows).sum())
        codes.append(rounded.codes.view(torch.uint8))
        scales.append(rounded.scales[:, None])
    stored = {"weight": torch.cat(codes).view(torch.float8_e4m3fn),
              "weight_scale": torch.cat(scales)}  # fmt: skip
    return stored, {"output_error": (max(wrong, 0.0) / max(whole, 1e-30)) ** 0.5}
