"""Vision-token pruning: which tokens of an image the decoder sees, before it and inside it."""

from epd_pruning.errors import PruningError
from epd_pruning.registry import available, fingerprint, layer_pruner, token_pruner

__all__ = ["PruningError", "available", "fingerprint", "layer_pruner", "token_pruner"]
