"""Conversations as a caller of `LLM` may write them, in the one form that the formatter takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from epd.errors import InvalidRequestError
from epd.images import ImageInput

__all__ = ["Conversation", "as_messages", "place_images"]

Conversation = str | Sequence[Mapping[str, Any]]


def as_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """OpenAI-shaped messages; a string is one question."""
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    return [dict(message) for message in conversation]


def place_images(
    messages: list[dict[str, Any]], images: list[ImageInput]
) -> tuple[list[dict[str, Any]], list[ImageInput]]:
    """The messages with bare image parts, and the images in the order of those parts."""
    spare = deque(images)
    placed: list[ImageInput] = []
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = [_bare(part, spare, placed) for part in message["content"]]
    asker = next((m for m in messages if m.get("role") == "user"), None)
    if spare and not placed and asker is not None:
        text = asker.get("content", "")
        parts = text if isinstance(text, list) else [{"type": "text", "text": text}]
        asker["content"] = [{"type": "image"}] * len(spare) + parts
        return messages, list(spare)
    if spare:
        raise InvalidRequestError(f"{len(spare)} images belong to no image part", "images")
    return messages, placed


def _bare(part: Any, spare: deque[ImageInput], placed: list[ImageInput]) -> Any:
    if not isinstance(part, Mapping) or part.get("type") != "image":
        return part
    if "image" in part:
        placed.append(part["image"])
    elif spare:
        placed.append(spare.popleft())
    else:
        raise InvalidRequestError("an image part has no image", "images")
    return {"type": "image"}
