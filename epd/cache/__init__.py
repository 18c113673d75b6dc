"""The token cache: vision tokens by content, shared by processes, never wrong."""

from epd.cache.base import CachedTokens, CacheStats, TokenCache
from epd.cache.factory import open_cache
from epd.cache.flight import SingleFlight
from epd.cache.keys import pixel_digest, token_cache_key
from epd.cache.memory import MemoryCache
from epd.cache.server import PrivateServer, find_server

__all__ = [
    "CacheStats",
    "CachedTokens",
    "MemoryCache",
    "PrivateServer",
    "SingleFlight",
    "TokenCache",
    "find_server",
    "open_cache",
    "pixel_digest",
    "token_cache_key",
]
