"""The messages of a role switch: orders to the worker, and what it reports to the gateway."""

from __future__ import annotations

import msgspec

from epd.message_base import Count, Letters, Message, Name, RequestMessage, Seconds, Text

__all__ = [
    "MoveDecode",
    "Returned",
    "SwitchAbort",
    "SwitchCommit",
    "SwitchFailed",
    "SwitchPhase",
    "SwitchReady",
    "SwitchRole",
]


# to a worker that changes its role


class SwitchRole(Message, frozen=True, kw_only=True):
    """Take up `stages`, coming from `epoch`: drain for at most `drain_seconds`, then load."""

    switch_id: Name
    stages: Letters
    epoch: Count
    drain_seconds: Seconds


class SwitchCommit(Message, frozen=True, kw_only=True):
    """The new role counts from now on, under the next epoch."""

    switch_id: Name


class SwitchAbort(Message, frozen=True, kw_only=True):
    """Go back to the old role; without effect once the switch is committed."""

    switch_id: Name


class MoveDecode(RequestMessage, frozen=True, kw_only=True):
    """Stop decoding the request between two steps and offer its KV to `consumer`."""

    consumer: Name


# to the gateway


class Returned(RequestMessage, frozen=True, kw_only=True):
    """Work handed back by a draining worker: these images, or with none the whole request."""

    items: list[Count] = msgspec.field(default_factory=list)


class SwitchPhase(Message, frozen=True, kw_only=True):
    """A phase of a switch ended (drain, unload, load), after so many seconds."""

    switch_id: Name
    phase: Name
    seconds: Seconds
    detail: Text = ""


class SwitchReady(Message, frozen=True, kw_only=True):
    """The new stages are loaded; the worker waits for the commit and serves nothing meanwhile
    that only one of both roles could.
    """

    switch_id: Name
    resident_bytes: Count


class SwitchFailed(Message, frozen=True, kw_only=True):
    """The worker refused the switch, or is back in its old role."""

    switch_id: Name
    phase: Name
    message: Text
