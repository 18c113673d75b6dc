"""A client of the admin API for the command line; every refusal becomes a typed error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from epd.errors import ConfigError, EPDError
from epd_services.admin.endpoint import Endpoint, find, read_token

__all__ = ["AdminClient", "RefusedError", "UnreachableError", "open_client"]


class RefusedError(EPDError):
    """The gateway refused; `reason` is the stable code of the refusal. Nothing was changed."""

    def __init__(self, error: dict[str, str]) -> None:
        lines = [str(error.get(name, "")) for name in ("what", "why", "next")]
        super().__init__("\n".join(lines))
        self.reason = str(error.get("code", ""))


class UnreachableError(EPDError):
    """No admin API answers there."""


def open_client(url: str | None, token_file: Path | None, run_dir: Path | None) -> AdminClient:
    """A client of the gateway that is named, or of the one that this user runs here.

    Raises `UnreachableError` when there is none, `ConfigError` when the token cannot be read.
    """
    if url is not None:
        if token_file is None:
            raise ConfigError(
                f"Cannot talk to {url}.\nNo token is known for it.\n"
                "Add --token-file with the file that the gateway uses."
            )
        endpoint = Endpoint(url, str(token_file), 0)
    else:
        try:
            endpoint = find(run_dir)
        except ConfigError as error:
            raise UnreachableError(str(error)) from None
    return AdminClient(endpoint.url, read_token(token_file or Path(endpoint.token_file)))


class AdminClient:
    """Talks to the admin API at `url`; a context manager."""

    def __init__(
        self,
        url: str,
        token: str,
        *,
        timeout: float = 10.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._url = url
        self._http = httpx.Client(
            base_url=url.rstrip("/") + "/admin/v1/",
            headers={"authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(timeout, connect=2.0),
            trust_env=False,
            transport=transport,
        )

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def status(self) -> dict[str, Any]:
        """Workers, queues, counters and the switches under way."""
        return self._ask("GET", "status")

    def history(self) -> list[dict[str, Any]]:
        """The switches so far, oldest first."""
        switches: list[dict[str, Any]] = self._ask("GET", "history")["switches"]
        return switches

    def preview(self, worker: str, stages: str, *, force: bool) -> dict[str, Any]:
        """What a switch would do."""
        return self._worker(worker, "switch", stages=stages, force=force, dry_run=True)

    def switch(self, worker: str, stages: str, **wish: Any) -> dict[str, Any]:
        """The record of a switch that was begun, was under way, or was not needed."""
        return self._worker(worker, "switch", stages=stages, **wish)

    def get(self, switch_id: str) -> dict[str, Any]:
        """The record of one switch."""
        return self._ask("GET", f"switches/{quote(switch_id, safe='')}")

    def drain(self, worker: str, *, force: bool) -> bool:
        """Close a worker's admission; whether that changed anything."""
        return bool(self._worker(worker, "drain", force=force)["changed"])

    def resume(self, worker: str) -> bool:
        """Open a worker's admission; whether that changed anything."""
        return bool(self._worker(worker, "resume")["changed"])

    def cache(self) -> dict[str, Any]:
        """The token cache and what each worker had of it."""
        return self._ask("GET", "cache", timeout=60.0)

    def flush(self) -> int:
        """Empty the token cache; how many images it held."""
        return int(self._ask("POST", "cache/flush", timeout=60.0)["flushed"])

    def _worker(self, worker: str, verb: str, **body: Any) -> dict[str, Any]:
        return self._ask("POST", f"workers/{quote(worker, safe='')}/{verb}", json=body)

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            with _typed(self._url):
                response = self._http.request(method, path, **options)
                value = response.json()
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self._stranger()
        if response.is_success:
            return value
        error = value.get("error")
        raise (
            RefusedError(error) if isinstance(error, dict) and "what" in error else self._stranger()
        )

    def _stranger(self) -> UnreachableError:
        return UnreachableError(
            f"Something else answers at {self._url}.\nIt is no admin API of epd.\n"
            "epd admin --run-dir DIRECTORY status"
        )


@contextlib.contextmanager
def _typed(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise UnreachableError(
            f"The admin API at {url} does not answer.\n"
            f"{type(error).__name__}: the gateway has ended, is starting, or is elsewhere.\n"
            "epd admin status, in a moment: a switch under way is finished or taken back meanwhile"
        ) from None
