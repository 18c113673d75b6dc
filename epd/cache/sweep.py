"""Counting and forgetting the keys of one prefix in Redis, page by page; others stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from epd.cache.replies import scan_reply

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["sweep"]

_PAGE = 500


async def sweep(
    call: Callable[..., Awaitable[Any]], pattern: str, *, remove: bool = False
) -> int | None:
    """How many keys match the glob `pattern`, after unlinking them if `remove`; None when `call`,
    which runs one command, got no answer, or one that no server gives.
    """
    cursor = 0
    found: set[bytes] = set()
    seen: set[int] = set()
    while True:
        page = scan_reply(await call("SCAN", cursor, "MATCH", pattern, "COUNT", _PAGE))
        if page is None or page[0] in seen:  # no cursor comes twice
            return None
        cursor, names = page
        # a key may show up on several pages while the table is resized
        fresh = [name for name in names if name not in found]
        found.update(fresh)
        if remove and fresh and await call("UNLINK", *fresh) is None:
            return None
        if cursor == 0:
            return len(found)
        seen.add(cursor)
