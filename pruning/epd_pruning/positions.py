"""Where the surviving tokens stand: position ids, the next position, and calibrated attention."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from epd_pruning.errors import PruningError
from epd_pruning.selection import at_least_fp32, cosine_matrix

__all__ = ["Placement", "PositionPolicy", "calibration_bias", "group_sizes", "place"]


class PositionPolicy(Enum):
    """KEEP: every survivor keeps its position, text too. RENUMBER: 0, 1, 2, … without gaps.

    KEEP_CALIBRATE: KEEP, and attention to survivors gets `calibration_bias`.
    """

    KEEP = "keep"
    RENUMBER = "renumber"
    KEEP_CALIBRATE = "keep+calibrate"

    @classmethod
    def parse(cls, name: str) -> PositionPolicy:
        """The policy called `name`, or a `PruningError`."""
        try:
            return cls(name)
        except ValueError:
            allowed = ", ".join(policy.value for policy in cls)
            raise PruningError("positions", f"one of {allowed}", name) from None


@dataclass(frozen=True, slots=True)
class Placement:
    """`positions` [L'] or [3, L'] of the survivors and the first one a new token takes."""

    positions: Tensor
    next_pos: int

    @property
    def rope_delta(self) -> int:
        """next_pos − L': what decode adds to a cache length if no layer prunes."""
        return self.next_pos - self.positions.shape[-1]


def place(
    positions: Tensor, survivors: Tensor, policy: PositionPolicy, *, next_pos: int | None = None
) -> Placement:
    """Positions of the rows `survivors` [L'] of a prompt placed at `positions` [L] or [3, L].

    `next_pos` is where the unpruned prompt would go on, max + 1 by default: under KEEP text after
    an image, and decoding, never move, however many tokens went. M-RoPE rows cannot be renumbered.
    """
    if policy is PositionPolicy.RENUMBER:
        if positions.dim() != 1:
            raise PruningError("positions", "keep or keep+calibrate with M-RoPE", policy.value)
        count = survivors.shape[0]
        return Placement(torch.arange(count, device=positions.device), count)
    if next_pos is None:
        next_pos = int(positions.max()) + 1 if positions.numel() else 0
    return Placement(positions[..., survivors], next_pos)


def group_sizes(embeddings: Tensor, keep_indices: Tensor) -> Tensor:
    """How many of the tokens `embeddings` [N, D] each kept one stands for, itself included: [k]."""
    home = cosine_matrix(embeddings, embeddings[keep_indices]).argmax(1)
    # a copy of a kept token may be nearer by rounding, or earlier
    home[keep_indices] = torch.arange(keep_indices.shape[0], device=home.device)
    return home.bincount(minlength=keep_indices.shape[0])


def calibration_bias(
    query_angles: Tensor, key_angles: Tensor, sizes: Tensor, *, ceiling: float = 2.0
) -> Tensor:
    """Additive log bias [Q, K] on attention logits: log(s·(c − D)), in fp32 (RESTORE, ICML 2026).

    Angles [Q, d/2] and [K, d/2] are position times RoPE frequency (M-RoPE picks its rows first);
    D = mean over frequencies of cos(difference) is how much RoPE alone lets the pair agree, c the
    `ceiling`, s `sizes` [K] the tokens each vision key stands for; a size of 0 marks a text key,
    which gets no bias.
    """
    if ceiling <= 1.0:
        raise PruningError("ceiling", "above 1", ceiling)
    query_angles, key_angles = at_least_fp32(query_angles), at_least_fp32(key_angles)
    cosines = query_angles.cos() @ key_angles.cos().mT + query_angles.sin() @ key_angles.sin().mT
    agreement = cosines / query_angles.shape[-1]
    bias = torch.log(sizes.clamp_min(1) * (ceiling - agreement))
    return torch.where(sizes > 0, bias, 0.0)
