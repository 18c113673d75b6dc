"""Token ids to text, piece by piece, releasing only text that can no longer change. No torch.

Three things can still change the end of decoded text: an unfinished UTF-8 sequence, a run of
byte-fallback tokens (whose decoding depends on the whole run), and a stop string that has begun.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

__all__ = ["Detokenizer"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """A stream from token ids to text for one answer.

    Everything `push` and `finish` return, joined, is `tokenizer.decode` of all ids, cut where the
    first stop string begins. `stopped` is that stop string once it has been found.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._skipped: frozenset[int] = frozenset()
        if skip_special_tokens:
            added = tokenizer.get_added_tokens_decoder()
            self._skipped = frozenset(i for i, token in added.items() if token.special)
        self._ids: list[int] = []
        self._window = self._decoded = 0
        self._released = 0
        self._pending = ""
        self.stopped: str | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these ids; empty after a stop string."""
        for token_id in token_ids:
            if token_id not in self._skipped:
                self._append(token_id)
        return self._take(final=False)

    def finish(self) -> str:
        """The rest of the text, now that no more ids follow."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        self._pending += text[self._released + len(self._pending) :] if self.stopped is None else ""
        return self._take(final=True)

    def _append(self, token_id: int) -> None:
        """Decode a window that starts one settled chunk back, so that words join rightly."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or self.stopped is not None:
            return
        self._ids.append(token_id)
        if _is_byte(token):
            return
        before = self._decode(self._window, self._decoded)
        text = self._decode(self._window, len(self._ids))
        if text.endswith(_UNFINISHED) or not text.startswith(before):
            return
        self._pending += text[len(before) :]
        self._window, self._decoded = self._decoded, len(self._ids)

    def _decode(self, start: int, stop: int) -> str:
        text: str = self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=False)
        return text

    def _take(self, *, final: bool) -> str:
        """Release what no stop string can still claim."""
        if self.stopped is not None:
            return ""
        found = min(((self._pending.find(s), len(s), s) for s in self._stop if s in self._pending),
                    default=None)  # fmt: skip
        held = len(self._pending) if final else self._first_beginning()
        if found is not None and found[0] <= held:
            held, self.stopped = found[0], found[2]
        text, self._pending = self._pending[:held], self._pending[held:]
        self._released += len(text)
        return text

    def _first_beginning(self) -> int:
        """Where the earliest suffix lies that a stop string could still grow out of."""
        text = self._pending
        longest = max(map(len, self._stop), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(s.startswith(text[start:]) and s != text[start:] for s in self._stop):
                return start
        return len(text)


def _is_byte(token: str) -> bool:
    """Whether this is a byte-fallback token such as `<0x0A>`."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
