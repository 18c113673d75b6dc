"""What a decode worker must know to continue a request whose KV another worker computed."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from epd.errors import EPDError, WireError
from epd.kv.formats import row_width
from epd.request import SamplingParams

__all__ = ["KVHandoff", "ModelFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What two workers must agree on before KV may move between them."""

    revision: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    vocab_size: int
    max_position: int
    layer_group: tuple[int, ...]
    kv_formats: tuple[str, ...]

    @property
    def num_groups(self) -> int:
        """Number of layer groups."""
        return max(self.layer_group) + 1


class KVHandoff(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request between prefill and decode: its tokens, its KV lengths, the shape of its KV.

    `prompt_token_ids` has one placeholder per vision token. The last of `output_token_ids` is the
    next input; `kv_lengths` (per layer group) covers everything before it. `next_pos` is that
    token's position and is carried, never derived from a length: pruned tokens leave gaps.
    `kv_formats` names per layer how its KV is held; it moves as it is.
    """

    request_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    sampling: SamplingParams
    kv_lengths: list[int]
    next_pos: int
    revision: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    layer_group: list[int]
    kv_formats: list[str]

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens together."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def shape(self, layer: int) -> tuple[int, int, int, int]:
        """Shape of the KV tensor of `layer`: [2, KV length, num_kv_heads, width]."""
        length = self.kv_lengths[self.layer_group[layer]]
        return (2, length, self.num_kv_heads, row_width(self.kv_formats[layer], self.head_dim))

    def validate(self, facts: ModelFacts) -> None:
        """Raise `WireError` unless the handoff is consistent and fits the model of `facts`."""
        for field in ("revision", "num_layers", "num_kv_heads", "head_dim", "dtype"):
            if getattr(self, field) != getattr(facts, field):
                raise WireError(f"KV handoff disagrees with this worker's model in {field}")
        if tuple(self.layer_group) != facts.layer_group:
            raise WireError("KV handoff disagrees with this worker's model in layer_group")
        if tuple(self.kv_formats) != facts.kv_formats:
            raise WireError("KV handoff disagrees with this worker in kv_formats")
        if not self.prompt_token_ids or not self.output_token_ids:
            raise WireError("KV handoff lacks prompt or output tokens")
        if not all(0 <= t < facts.vocab_size for t in self.output_token_ids):
            raise WireError("KV handoff names a token outside the vocabulary")
        if min(self.prompt_token_ids) < 0:
            raise WireError("KV handoff names a token outside the vocabulary")
        if len(self.kv_lengths) != facts.num_groups:
            raise WireError("KV handoff has the wrong number of KV lengths")
        # the first group holds every token but the next input; a deeper one may hold fewer
        longest, lengths = self.num_tokens - 1, self.kv_lengths
        if lengths[0] != longest or lengths[-1] < 1 or lengths != sorted(lengths, reverse=True):
            raise WireError("KV handoff has KV lengths that do not fit its tokens")
        if not longest <= self.next_pos < facts.max_position:
            raise WireError("KV handoff has a next position that does not fit its tokens")
        try:
            self.sampling.validate()
        except EPDError as error:
            raise WireError("KV handoff has sampling parameters out of range") from error
        if len(self.output_token_ids) >= self.sampling.max_tokens:
            raise WireError("KV handoff of a request that has ended")
