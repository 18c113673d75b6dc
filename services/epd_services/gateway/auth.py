"""Optional API keys: a file of keys, compared by hash in constant time; each key is a tenant."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from starlette.datastructures import Headers

from epd.errors import ConfigError
from epd_services.gateway.errors import UnauthorizedError

__all__ = ["ApiKeys", "combine_salts"]

_MAX_KEYS = 1024


class ApiKeys:
    """The set of accepted keys; empty means that everybody may come in. Keeps hashes only."""

    def __init__(self, keys: list[str]) -> None:
        self._hashes = [_hash(key) for key in keys]

    @classmethod
    def load(cls, path: Path | None) -> ApiKeys:
        """Keys from a file, one a line, `#` starting a comment. Raises `ConfigError`."""
        if path is None:
            return cls([])
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"the API key file {path} cannot be read") from None
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys or len(keys) > _MAX_KEYS:
            raise ConfigError(f"the API key file {path} must hold 1 to {_MAX_KEYS} keys")
        if any(len(key) < 16 for key in keys):
            raise ConfigError(f"a key in {path} is shorter than 16 characters")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def tenant_salt(self, headers: Headers) -> str:
        """The salt of the caller's tenant, empty without keys. Raises `UnauthorizedError`."""
        if not self._hashes:
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _hash(key.strip())
        # every key is compared, so that time tells nothing
        matches = [hmac.compare_digest(given, known) for known in self._hashes]
        if scheme.lower() != "bearer" or not any(matches):
            raise UnauthorizedError("A valid API key is required.", "Authorization")
        return hmac.new(given, b"epd tenant salt", hashlib.sha256).hexdigest()


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def combine_salts(tenant: str, cache_salt: str | None) -> str:
    """One salt out of the tenant's and the request's; empty when neither is set."""
    if not cache_salt:
        return tenant
    digest = hashlib.sha256(f"{len(tenant)}:{tenant}".encode())
    digest.update(cache_salt.encode())
    return digest.hexdigest()
