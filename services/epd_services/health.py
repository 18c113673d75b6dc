"""`python -m epd_services.health TARGET`: exit code 0 if TARGET is healthy, else 1 and why.

TARGET is the URL of a gateway's `/ready`, or the file that a worker touches (`EPD_HEALTH_FILE`). A
container's health check; the standard library alone, because it runs every few seconds.
"""

from __future__ import annotations

import http.client
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["main", "problem"]

_TIMEOUT = 2.0
_STALE = 5.0


def problem(target: str) -> str | None:
    """What is wrong with `target`; None if it is healthy."""
    if target.startswith("http://"):
        return _http_problem(target)
    try:
        age = time.time() - Path(target).stat().st_mtime
    except OSError as error:
        return f"{target}: {error.strerror}"
    return f"{target} is {age:.0f} s old" if age > _STALE else None


def _http_problem(url: str) -> str | None:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=_TIMEOUT)
    try:
        connection.request("GET", parts.path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"{url}: {error}"
    finally:
        connection.close()
    return None if status == 200 else f"{url} answers {status}"


def main() -> None:
    """Check the one argument."""
    sys.exit(problem(sys.argv[1]))


if __name__ == "__main__":
    main()
