"""A small client of a running service: a question with images in, the answer and its times out.

Errors of the service and of the network come back in the reply, so that a load generator can count
them; only misuse raises.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx

__all__ = ["ChatClient", "Reply", "chat_body", "data_url"]

_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}


@dataclass(slots=True, kw_only=True)
class Reply:
    """What one request brought. `status` 0 means that no HTTP answer came.

    `ttft`, `tpot` and `total` are seconds as this client saw them; `timings` are the service's.
    `repeats` counts events that came again or out of turn.
    """

    status: int = 0
    text: str = ""
    error: str | None = None
    code: str | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    ttft: float | None = None
    tpot: float | None = None
    total: float = 0.0
    repeats: int = 0

    @property
    def complete(self) -> bool:
        """Whether the whole answer came."""
        return self.finish_reason is not None and self.error is None

    @property
    def terminal(self) -> bool:
        """Whether the request came to any end that the service itself declared."""
        return self.complete or self.code is not None


def data_url(image: bytes) -> str:
    """The `data:` URL of an image file's bytes; the type is told from the first of them."""
    kind = next((name for magic, name in _KINDS.items() if image.startswith(magic)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def chat_body(question: str, images: Sequence[bytes] = (), **options: Any) -> dict[str, Any]:
    """The body of a chat completion: the images in order, then the question."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in images
    ]
    parts.append({"type": "text", "text": question})
    return {"messages": [{"role": "user", "content": parts}], **options}


class ChatClient:
    """Talks to the service at `url`; an async context manager."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 150.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/"),
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=5.0),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
            transport=transport,
        )

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> dict[str, Any] | None:
        """The JSON object at `path`; None when nobody answers or the answer is no success."""
        try:
            response = await self._http.get(path, timeout=2.0)
            value = response.json() if response.is_success else None
        except (httpx.HTTPError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    async def ask(
        self,
        question: str,
        images: Sequence[bytes] = (),
        *,
        stream: bool = True,
        on_text: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Reply:
        """The reply to one question. `on_text` gets the pieces of a streamed answer."""
        body = chat_body(question, images, **options)
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        content = json.dumps(body).encode()
        exchange = _Exchange(on_text)
        headers = {"content-type": "application/json"}
        try:
            async with self._http.stream(
                "POST", "/v1/chat/completions", content=content, headers=headers
            ) as response:
                exchange.reply.status = response.status_code
                if stream and response.is_success:
                    await exchange.follow(response.aiter_lines())
                else:
                    exchange.whole(await response.aread())
        except httpx.HTTPError as error:
            exchange.reply.error = f"{type(error).__name__}: {error}".rstrip(": ")
        return exchange.finish()


class _Exchange:
    """One request in flight: assembles its reply and keeps the time."""

    def __init__(self, on_text: Callable[[str], None] | None) -> None:
        self.reply = Reply()
        self._on_text = on_text
        self._begin = time.perf_counter()
        self._last_text = 0.0
        self._last_id = -1

    def whole(self, content: bytes) -> None:
        """Take one JSON answer, or an error envelope."""
        try:
            body = json.loads(content)
        except ValueError:
            body = {"error": {"message": f"HTTP {self.reply.status}"}}
        if "error" in body:
            self._fail(body["error"])
            return
        choice = body["choices"][0]
        self.reply.text = choice["message"]["content"]
        self.reply.finish_reason = choice["finish_reason"]
        self._counts(body)

    async def follow(self, lines: AsyncIterator[str]) -> None:
        """Take the events of a stream until it ends."""
        async for line in lines:
            name, _, value = line.partition(": ")
            if name == "id":
                number = int(value)
                self.reply.repeats += number <= self._last_id
                self._last_id = max(number, self._last_id)
            elif name == "data" and value != "[DONE]":
                self._event(json.loads(value))

    def _event(self, body: dict[str, Any]) -> None:
        if "error" in body:
            self._fail(body["error"])
            return
        self._counts(body)
        for choice in body["choices"]:
            text = choice["delta"].get("content") or ""
            self.reply.finish_reason = choice["finish_reason"] or self.reply.finish_reason
            if text or choice["finish_reason"]:
                self._last_text = time.perf_counter() - self._begin
                self.reply.ttft = self.reply.ttft or self._last_text
            if text:
                self.reply.text += text
                if self._on_text:
                    self._on_text(text)

    def _counts(self, body: dict[str, Any]) -> None:
        self.reply.usage = body.get("usage") or self.reply.usage
        self.reply.timings = body.get("timings") or self.reply.timings

    def _fail(self, error: dict[str, Any]) -> None:
        self.reply.error = str(error.get("message"))
        self.reply.code = str(error.get("code") or self.reply.status)

    def finish(self) -> Reply:
        """The reply, with its times complete."""
        reply = self.reply
        reply.total = time.perf_counter() - self._begin
        tokens = reply.usage.get("completion_tokens", 0)
        if reply.ttft is not None and tokens > 1:
            reply.tpot = (self._last_text - reply.ttft) / (tokens - 1)
        return reply
