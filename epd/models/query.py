"""Questions as the vectors that query-conditioned pruning compares vision tokens with."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch

from epd.chat import load_tokenizer
from epd.errors import InvalidRequestError
from epd.models.alignment import relevance_sign
from epd.models.text_tower import TextTower

if TYPE_CHECKING:
    from epd.models.card import ModelCard
    from epd.models.decoder import Decoder

__all__ = ["QueryEncoder"]

_REMEMBERED = 256


class QueryEncoder:
    """The text tower, if the checkpoint has one, and the decoder's input embeddings.

    Remembers the last questions. `sign` is how the tower's similarities are to be read.
    """

    def __init__(self, card: ModelCard, decoder: Decoder) -> None:
        self.tower = TextTower.load(card, decoder.device, decoder.dtype)
        self.sign = relevance_sign(card.path)
        self._decoder = decoder
        self._tokenizer = load_tokenizer(card.path)
        self._known: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()

    def resident_bytes(self) -> int:
        """Bytes that the tower's weights hold."""
        return self.tower.resident_bytes() if self.tower is not None else 0

    def encode(self, kind: str, text: str) -> torch.Tensor:
        """`[M, C]` by "clip_text", `[1, D]` by "llm_embed_mean"; no rows for an empty text.

        Raises `InvalidRequestError` when the checkpoint cannot do it.
        """
        key = (kind, text)
        if key not in self._known:
            self._known[key] = self._compute(kind, text)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    @torch.no_grad()
    def _compute(self, kind: str, text: str) -> torch.Tensor:
        if kind == "clip_text":
            if self.tower is None:
                raise InvalidRequestError(
                    "query_encoder clip_text needs a checkpoint with a text_tower; "
                    "llm_embed_mean needs none",
                    "pruning.params.query_encoder",
                )
            return self.tower.encode(text)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        embedded = self._decoder.embed(torch.tensor(ids, device=self._decoder.device).long())
        return embedded.float().mean(0, keepdim=True) if ids else embedded.float()
