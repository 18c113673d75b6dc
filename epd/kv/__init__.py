"""Paged KV: who owns which block, the block tensors, and the move of one request's KV.

Importing this package imports no torch; `epd.kv.pool` does.
"""

from epd.kv.blocks import BlockManager, BlockTable
from epd.kv.handoff import KVHandoff, ModelFacts

__all__ = ["BlockManager", "BlockTable", "KVHandoff", "ModelFacts"]
