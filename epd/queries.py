"""Which question goes with which image of a conversation, for methods that choose by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["QUERY_CHARS", "image_queries"]

QUERY_CHARS = 4096


def image_queries(messages: Sequence[Mapping[str, Any]], turns: str) -> list[str]:
    """One text per image part, in order: of the last user turn, or with "sticky" of its own turn.

    Content is text or a list of `{"type": "text", "text": ...}` and `{"type": "image"}` parts. The
    first `QUERY_CHARS` characters count.
    """
    asked = [_text(m) for m in messages if m.get("role") == "user"]
    last = next((text for text in reversed(asked) if text), "")
    return [
        _text(message) if turns == "sticky" else last
        for message in messages
        for part in _parts(message)
        if part.get("type") == "image"
    ]


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part for part in content or () if isinstance(part, Mapping)]


def _text(message: Mapping[str, Any]) -> str:
    texts = [str(part.get("text", "")) for part in _parts(message) if part.get("type") == "text"]
    return " ".join(" ".join(texts).split())[:QUERY_CHARS]
