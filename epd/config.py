"""Engine settings without tensors; services resolve theirs from flags, environment and TOML."""

from __future__ import annotations

import msgspec

__all__ = ["EngineConfig"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of one engine core. `num_blocks` None derives the count from `kv_memory_bytes`.

    `layer_pruning` names a method that prunes inside the decoder for requests that ask for it, and
    the layers after which it does ("adaptinfer", "adaptinfer:1,3,4"); None: no request may. `kv`
    is how keys and values are held: bf16 (the model's dtype), fp8, int4, or auto, which is what the
    checkpoint was quantised for. On a GPU small steps are replayed as CUDA graphs, unless
    `cuda_graphs` is off, within `graph_memory_bytes`.
    """

    block_size: int = 16
    num_blocks: int | None = None
    kv_memory_bytes: int = 256 << 20
    max_num_seqs: int = 64
    max_batched_tokens: int = 2048
    max_model_len: int | None = None
    prefix_cache: bool = True
    chunked_prefill: bool = True
    layer_pruning: str | None = None
    kv: str = "auto"
    cuda_graphs: bool = True
    graph_memory_bytes: int = 1 << 30
