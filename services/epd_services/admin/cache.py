"""What operators see of the shared token cache, and how they empty it."""

from __future__ import annotations

from typing import Any

import structlog

from epd.errors import UnavailableError
from epd_services.gateway.dispatcher import PipelineDispatcher
from epd_services.gateway.refusals import OperatorError

__all__ = ["cache_report", "flush_cache"]

_log = structlog.get_logger("epd.admin")
_COLUMNS = ("cache_queries", "cache_hits", "cache_errors")


async def cache_report(dispatcher: PipelineDispatcher) -> dict[str, Any]:
    """How many images the shared cache holds (None: no answer), and what each worker had of it."""
    cache = dispatcher.cache
    return {
        "shared": cache is not None,
        "entries": await cache.count() if cache is not None else None,
        "breaker": cache.stats().breaker if cache is not None else None,
        "workers": [
            {"name": worker["name"], **{name: worker[name] for name in _COLUMNS}}
            for worker in dispatcher.pipeline()["workers"]
        ],
    }


async def flush_cache(dispatcher: PipelineDispatcher) -> int:
    """Forget every cached image; how many. Requests that counted on one have it encoded again.

    Raises `OperatorError` without a shared cache, `UnavailableError` when it does not answer.
    """
    if dispatcher.cache is None:
        raise OperatorError(
            "Cannot flush the token cache.",
            "Without a cache server every worker keeps its own.",
            "restart the workers, or start epd serve where redis-server is installed",
        )
    flushed = await dispatcher.cache.count(clear=True)
    if flushed is None:
        raise UnavailableError(
            "Cannot flush the token cache.\nIts server does not answer.\nepd admin cache stats"
        )
    _log.info("token cache flushed", entries=flushed)
    return flushed
