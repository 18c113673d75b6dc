"""What all messages are made of: their base classes and the bounds of their fields."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from epd.queries import QUERY_CHARS

__all__ = [
    "Count",
    "Letters",
    "Life",
    "Message",
    "Name",
    "Query",
    "RequestMessage",
    "Seconds",
    "Text",
    "TokenId",
]

Name = Annotated[str, Meta(min_length=1, max_length=128)]
Text = Annotated[str, Meta(max_length=512)]
Query = Annotated[str, Meta(max_length=QUERY_CHARS)]
Count = Annotated[int, Meta(ge=0, le=1 << 40)]
Life = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Letters = Annotated[str, Meta(pattern="^[EPD]{1,3}$")]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
TokenId = Annotated[int, Meta(ge=0, le=1 << 31)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything that crosses the wire."""


class RequestMessage(Message, frozen=True, kw_only=True):
    """A message about one attempt at one request; late attempts are told apart by `attempt`."""

    request_id: Name
    attempt: Count
