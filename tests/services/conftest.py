"""A real gateway on a loopback port in front of a scripted pipeline."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx
import openai
import pytest
import structlog
import uvicorn
from PIL import Image

from epd.chat import ChatFormatter
from epd.demo import CHECKPOINT
from epd.membership import Membership
from epd.messages import SwitchRole
from epd.models.card import ModelCard
from epd.node import GATEWAY, Identity, Node
from epd.request import SamplingParams
from epd.roles import parse_stages
from epd.transport import InMemoryTransport
from epd.wire import Codec
from epd_services.gateway.app import create_app
from epd_services.gateway.dispatch_api import Generation, ImagePixels, Submission
from epd_services.gateway.dispatcher import PipelineDispatcher
from epd_services.gateway.fake import FakeDispatcher, Script
from epd_services.gateway.fake_worker import FakeWorker
from epd_services.gateway.fetch import ImageFetcher
from epd_services.gateway.server import server_config
from epd_services.gateway.settings import GatewaySettings
from epd_services.gateway.switches import SwitchRecord

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


class World:
    """A gateway without sockets, its clock, and the workers around it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.steps: list[str] = []
        self.network: dict[str, Any] = {}
        self.workers: dict[str, FakeWorker] = {}
        self.members = Membership("r", self.clock)
        self.node = Node(Identity(GATEWAY, 7), InMemoryTransport(GATEWAY, self.network), Codec())
        self.dispatcher = PipelineDispatcher(
            self.node, self.members, None, clock=self.clock, failpoint=self.steps.append
        )
        self.roles = self.dispatcher.roles

    def clock(self) -> float:
        return self.now

    def worker(self, name: str) -> FakeWorker:
        return self.workers[name]

    async def join(self, **stages: str) -> None:
        for name, letters in stages.items():
            self.workers[name] = FakeWorker(self.network, name, letters)
            self.workers[name].beat()
        await self.settle()

    async def settle(self) -> None:
        """Let every message that is under way arrive."""
        for _ in range(20):
            await asyncio.sleep(0)
        while not self.network[GATEWAY].empty():
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def wait(self, seconds: float, *silent: str) -> None:
        """Let time pass; everybody but the `silent` goes on sending heartbeats."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 0.25)
            for name, worker in self.workers.items():
                if name not in silent:
                    worker.read(SwitchRole)
                    worker.beat()
            await self.settle()
            self.dispatcher._apply(self.members.expire())
            self.roles.tick()

    def ask(self, images: int = 0, name: str = "q") -> Generation:
        pixels = [ImagePixels(1, 1, bytes([n, 0, 0])) for n in range(images)]
        return self.dispatcher.submit(
            Submission(
                request_id=name, prompt_token_ids=[1], images=pixels, timeout_s=60.0,
                sampling=SamplingParams(max_tokens=8, ignore_eos=True), salt="",
            )
        )  # fmt: skip

    def hosting(self, stages: str) -> list[str]:
        """Names of the workers that get work of a stage."""
        return [w.worker_id for w in self.members.hosting(*parse_stages(stages))]

    def switch(self, worker: str, stages: str, **options: Any) -> SwitchRecord:
        return self.roles.start(worker, parse_stages(stages), drain_seconds=2.0, **options)


@asynccontextmanager
async def role_world(**stages: str) -> AsyncIterator[World]:
    made = World()
    listening = asyncio.create_task(made.node.run())
    await made.join(**stages)
    try:
        yield made
    finally:
        await made.dispatcher._attempts.stop()
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening


class Worlds:
    """Makes worlds, and runs what happens in one."""

    four: ClassVar = {"e": "E", "p": "P", "d": "D", "d2": "D"}

    def __call__(self, **stages: str) -> AbstractAsyncContextManager[World]:
        """A world of workers by name; without any, of the usual four."""
        return role_world(**(stages or self.four))

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`, for 20 seconds at most."""

        async def bounded() -> None:
            async with asyncio.timeout(20):
                await work

        asyncio.run(bounded())


@pytest.fixture(scope="session")
def world() -> Worlds:
    """The gateway's core among scripted workers, on a clock of its own."""
    return Worlds()
