"""Image parts to bytes: strict `data:` URLs, and http(s) URLs through the fetcher when enabled."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable

from epd.errors import MediaError
from epd_services.gateway.fetch import ImageFetcher

__all__ = ["image_bytes", "parse_data_url"]

_PARAM = "messages"
_DATA_URL = re.compile(r"data:(image/(?:png|jpeg|jpg|webp|gif));base64,", re.IGNORECASE)


def parse_data_url(url: str, max_bytes: int) -> bytes:
    """The decoded bytes of a base64 image `data:` URL. Raises `MediaError`."""
    head = _DATA_URL.match(url[:64])
    if head is None:
        raise MediaError(
            "A data URL must be base64 with type image/png, jpeg, webp or gif.", _PARAM
        )
    if len(url) - head.end() > 4 * (max_bytes // 3 + 1):
        raise MediaError("The image has too many bytes.", _PARAM)
    try:
        data = base64.b64decode(url[head.end() :].encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        raise MediaError("The data URL is not valid base64.", _PARAM) from None
    if not data:
        raise MediaError("The image is empty.", _PARAM)
    return data


async def image_bytes(
    url: str, max_bytes: int, fetcher: ImageFetcher | None, take: Callable[[int], None]
) -> bytes:
    """The encoded image behind `url`; what is fetched is counted by `take`. Raises `MediaError`."""
    if url[:5].lower() == "data:":
        return parse_data_url(url, max_bytes)
    if url[:4].lower() == "http":
        if fetcher is None:
            raise MediaError(
                "Image URLs are not fetched here; send the image itself as a base64 data URL.",
                _PARAM,
            )
        return await fetcher.fetch(url, take)
    raise MediaError("The image URL must be a data, http or https URL.", _PARAM)
