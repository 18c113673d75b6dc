"""A real gateway on a loopback port in front of a scripted pipeline."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import structlog
import uvicorn
from PIL import Image

from epd.chat import ChatFormatter
from epd.demo import CHECKPOINT
from epd.models.card import ModelCard
from epd_services.gateway.app import create_app
from epd_services.gateway.fake import FakeDispatcher, Script
from epd_services.gateway.fetch import ImageFetcher
from epd_services.gateway.server import server_config
from epd_services.gateway.settings import GatewaySettings

MODEL = "demo"


@dataclass
class Gateway:
    """One running gateway and what stands around it."""

    url: str
    dispatcher: FakeDispatcher
    formatter: ChatFormatter
    server: uvicorn.Server
    thread: threading.Thread
    settings: GatewaySettings
    http: httpx.Client

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def openai(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)

    def say(self, text: str, **script: Any) -> None:
        """Script every answer to be `text`."""
        ids = self.formatter.tokenizer.encode(text, add_special_tokens=False).ids
        self.dispatcher.script = Script(token_ids=ids, **script)

    def post(self, body: Any, **kwargs: Any) -> httpx.Response:
        kwargs.setdefault("timeout", 20)
        if isinstance(body, bytes):
            headers = {"content-type": "application/json", **kwargs.pop("headers", {})}
            kwargs.update(content=body, headers=headers)
        else:
            kwargs.update(json=body)
        return self.http.post("/v1/chat/completions", **kwargs)

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path)

    def ask(self, content: Any = "hi", **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
        return self.post(body)

    def stop(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join(20)


def _start(settings: GatewaySettings, dispatcher: FakeDispatcher, formatter: ChatFormatter,
           fetcher: ImageFetcher | None) -> Gateway:  # fmt: skip
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = create_app(settings, dispatcher, formatter, fetcher=fetcher)
    config = server_config(app, settings, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until, "the gateway did not start"
        time.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = httpx.Client(base_url=url, trust_env=False, verify=False, timeout=20)
    return Gateway(url, dispatcher, formatter, server, thread, settings, client)


@pytest.fixture(scope="session", autouse=True)
def log_lines() -> Iterator[list[str]]:
    """Every structured log line of the session, as JSON."""
    lines: list[str] = []

    def keep(_: Any, __: str, event: Any) -> Any:
        lines.append(json.dumps(event, default=str))
        raise structlog.DropEvent

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            keep,
        ],
        cache_logger_on_first_use=False,
    )
    yield lines
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def chat_formatter() -> ChatFormatter:
    return ChatFormatter(ModelCard.load(CHECKPOINT))


@pytest.fixture(scope="module")
def start_gateway(chat_formatter: ChatFormatter) -> Iterator[Callable[..., Gateway]]:
    """Start gateways with given limits; all of them stop with the module."""
    running: list[Gateway] = []

    def start(
        dispatcher: FakeDispatcher | None = None,
        *,
        fetcher: ImageFetcher | None = None,
        **limits: Any,
    ) -> Gateway:
        settings = GatewaySettings(model_name=MODEL, **{"decode_children": 1, **limits})
        running.append(_start(settings, dispatcher or FakeDispatcher(), chat_formatter, fetcher))
        return running[-1]

    yield start
    for gateway in running:
        gateway.stop()


@pytest.fixture(scope="module")
def gateway(start_gateway: Callable[..., Gateway]) -> Gateway:
    """One gateway for the module, with the default limits."""
    return start_gateway(FakeDispatcher(image_tokens=16))


@pytest.fixture
def png_url() -> str:
    """A small PNG as a data URL."""
    return data_url(png_bytes(Image.new("RGB", (8, 6), (10, 200, 30))))


def png_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """Two API keys."""
    path = tmp_path / "keys"
    path.write_text("# tenants\nalpha-key-0123456789\nbravo-key-0123456789\n")
    return path
