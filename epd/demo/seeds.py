"""Seeds of training batches and of held-out examples; the two ranges never meet.

Both stay below 2**32, because the CPU generator reads no more than 32 bits of a seed.
"""

from __future__ import annotations

TRAINING_SEEDS = range(0, 2**31)
HELD_OUT_SEEDS = range(2**31, 2**32)
EXAMPLES_PER_SEED = 2**20


def training_seed(step: int) -> int:
    """The seed of the batch of one training step."""
    return TRAINING_SEEDS[step]


def held_out_seed(seed: int, index: int) -> int:
    """The seed of example `index` of the held-out set `seed` (0 to 2047)."""
    if not 0 <= index < EXAMPLES_PER_SEED:
        raise ValueError(f"a held-out set has {EXAMPLES_PER_SEED} examples, not one at {index}")
    return HELD_OUT_SEEDS[seed * EXAMPLES_PER_SEED + index]
