"""What a server may answer, checked: one that is broken or lies is no more than a miss."""

from __future__ import annotations

from redis.exceptions import ResponseError

__all__ = ["UnexpectedReplyError", "bytes_reply", "int_reply", "scan_reply"]


class UnexpectedReplyError(Exception):
    """The server answered something that the command cannot give."""


def bytes_reply(reply: object) -> bytes:
    """The reply, if it is bytes. Raises the error that it may be, or `UnexpectedReplyError`."""
    if isinstance(reply, bytes):
        return reply
    raise _wrong(reply)


def int_reply(reply: object) -> int:
    """As `bytes_reply`, of a whole number."""
    if isinstance(reply, int):
        return reply
    raise _wrong(reply)


def _wrong(reply: object) -> Exception:
    return reply if isinstance(reply, ResponseError) else UnexpectedReplyError()


def scan_reply(reply: object) -> tuple[int, list[bytes]] | None:
    """The next cursor and the names of one page of SCAN; None for anything else."""
    match reply:
        case [int(cursor), list(names)] if all(isinstance(name, bytes) for name in names):
            return cursor, names
    return None
