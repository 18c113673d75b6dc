"""Which vision tokens survive: random holes for training, and exact greedy DPP.

Training must show the decoder incomplete grids, or it collapses the first time tokens are pruned.
Dropping works through the attention mask, so positions stay what they were in the full grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epd.demo.scenes import PatchLabels, uniform
from epd.demo.world import CHARS, MAX_OBJECTS
from epd_pruning.dpp import greedy_dpp
from epd_pruning.selection import cosine_matrix

COMPLETE_SHARE = 0.3
DPP_STRIDE = 4
DPP_FEWEST, DPP_MOST = 20, 80
HIDING_SHARE, HIDING_CHANCE = 0.45, 0.7


@torch.no_grad()
def greedy_picks(features: Tensor, count: int) -> Tensor:
    """The first `count` greedy picks for the cosines of `features` `[B, N, D]`, int64 `[B, count]`.

    In the order of picking: prefixes are the answers for smaller counts.
    """
    return greedy_dpp(cosine_matrix(features), count).indices


@torch.no_grad()
def draw_kept(
    labels: PatchLabels, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random survivors, bool `[B, N]`, and which samples lost nothing, bool `[B]`.

    `share` of the samples are considered, and 30 % of those stay complete as well. Background stays
    with probability p, objects with at least p, characters with at least half.
    """
    batch, num_tokens = labels.obj.shape
    background = 0.02 + 0.88 * uniform(generator, batch, 1) ** 1.5
    objects = torch.maximum(background, 0.2 + 0.8 * uniform(generator, batch, 1))
    chars = torch.maximum(objects, 0.5 + 0.5 * uniform(generator, batch, 1))
    chance = torch.where(labels.obj < MAX_OBJECTS, objects, background)
    chance = torch.where(labels.char < len(CHARS), chars, chance)
    complete = uniform(generator, batch) < COMPLETE_SHARE
    complete |= uniform(generator, batch) >= share
    kept = uniform(generator, batch, num_tokens) < chance
    return kept | complete[:, None], complete


@torch.no_grad()
def draw_visible(
    labels: PatchLabels, about: Tensor, *, complete: Tensor, generator: torch.Generator
) -> Tensor:
    """What each question may see, bool `[B, K, N]`; `about` is `[B, K, O + 1]`.

    In 45 % of the incomplete samples every object or word that a question is not about is hidden
    from it with probability 0.7, as a pruner that knows the question would do.
    """
    batch, num_slots = about.shape[:2]
    hidden = uniform(generator, batch, num_slots, MAX_OBJECTS + 1) < HIDING_CHANCE
    hidden &= (uniform(generator, batch, 1, 1) < HIDING_SHARE) & ~complete[:, None, None]
    hidden &= ~about
    # one more column that is never hidden: the background
    hidden = torch.cat([hidden, torch.zeros_like(hidden[..., :1])], -1)
    owner = torch.where(labels.obj < MAX_OBJECTS, labels.obj, MAX_OBJECTS + 1)
    owner = torch.where(labels.char < len(CHARS), MAX_OBJECTS, owner)
    return ~hidden.gather(2, owner[:, None].expand(-1, num_slots, -1))


@torch.no_grad()
def draw_dpp_counts(complete: Tensor, generator: torch.Generator) -> Tensor:
    """How many tokens greedy DPP keeps in every fourth sample, int64; 0 = DPP does not choose."""
    complete = complete[::DPP_STRIDE]
    span = DPP_MOST - DPP_FEWEST + 1
    return (DPP_FEWEST + (uniform(generator, len(complete)) * span).long()) * ~complete


@torch.no_grad()
def keep_by_dpp(features: Tensor, kept: Tensor, counts: Tensor) -> Tensor:
    """`kept` `[B, N]`, where every fourth row with a count holds that many greedy DPP picks."""
    picks = greedy_picks(features[::DPP_STRIDE], min(DPP_MOST, features.shape[1]))
    early = torch.arange(picks.shape[1], device=picks.device) < counts[:, None]
    chosen = torch.zeros_like(kept[::DPP_STRIDE]).scatter(1, picks, early)
    kept = kept.clone()
    kept[::DPP_STRIDE] = torch.where(counts[:, None] > 0, chosen, kept[::DPP_STRIDE])
    return kept
