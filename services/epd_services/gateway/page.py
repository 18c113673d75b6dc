"""The page at `/`: one static file, served with a policy that lets it talk to this gateway only."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.responses import Response

__all__ = ["page_response"]


@cache
def _page() -> tuple[bytes, str]:
    html = files("epd_services.gateway").joinpath("page.html").read_bytes()
    return html, (
        f"default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; "
        f"script-src {_hashes(html, b'script')}; style-src {_hashes(html, b'style')}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(html: bytes, tag: bytes) -> str:
    """The content-security-policy sources of every inline `tag`."""
    bodies = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(body).digest()).decode() for body in bodies)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def page_response() -> Response:
    """The playground."""
    html, policy = _page()
    return Response(
        html,
        media_type="text/html; charset=utf-8",
        headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"},
    )
