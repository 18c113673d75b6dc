"""A stack of real processes, with clients that remember what they were told."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from epd.config import EngineConfig
from epd.messages import WorkerStats
from epd.models.card import ModelCard
from epd.models.tiny import write_tiny_llava
from epd.request import SamplingParams, TokenOutput
from epd.roles import parse_stages
from epd_services.gateway.dispatch_api import ImagePixels, Submission
from epd_services.gateway.switches import SwitchRecord
from epd_services.local_pipeline import LocalPipeline
from epd_services.settings import Settings, load_settings
from epd_services.supervisor import Supervisor


@dataclass
class Reply:
    """What one streaming client saw."""

    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    retry_after: str | None = None
    chunks: list[str] = field(default_factory=list)


class Stack:
    """A supervisor and its processes, driven from a thread of their own."""

    def __init__(self, settings: Settings) -> None:
        self.url = f"http://127.0.0.1:{settings.port}"
        self.supervisor = Supervisor(settings)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.call(self.supervisor.start())
        self.wait_ready()
        self.model = httpx.get(f"{self.url}/v1/models").json()["data"][0]["id"]

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def wait_ready(self, workers: int | None = None, limit: float = 60.0) -> None:
        """Until `/ready` says so, and as many workers as the topology has are known."""
        expected = workers or len(self.supervisor.children) - 1
        until = time.monotonic() + limit
        while time.monotonic() < until:
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200 and (
                    len(self.pipeline()["workers"]) >= expected
                ):
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(self.logs())

    def pipeline(self) -> dict[str, Any]:
        data: dict[str, Any] = httpx.get(f"{self.url}/v1/pipeline").json()
        return data

    def logs(self) -> str:
        directory = self.supervisor.run_dir
        return "\n".join(f"{p.name}: {p.read_text()[-2000:]}" for p in directory.glob("*.log"))

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        pid = self.supervisor.children[name]
        assert pid is not None
        os.kill(pid, number)

    def stop(self) -> None:
        self.call(self.supervisor.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    def body(self, images: list[Image.Image], question: str, **fields: Any) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in images
        ]
        content = [*parts, {"type": "text", "text": question}]
        return {"model": self.model, "messages": [{"role": "user", "content": content}], **fields}

    async def stream(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Reply:
        """One streaming request, read to its end."""
        reply = Reply()
        asked = body | {"stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", f"{self.url}/v1/chat/completions", json=asked) as response:
            reply.status = response.status_code
            reply.retry_after = response.headers.get("retry-after")
            if response.status_code != 200:
                reply.error = json.loads(await response.aread())["error"]
                return reply
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _take(reply, json.loads(line[6:]))
        return reply

    async def all(self, bodies: list[dict[str, Any]], **client: Any) -> list[Reply]:
        """Every body at once."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as session:
            return await asyncio.gather(*(self.stream(session, body) for body in bodies))


def _take(reply: Reply, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        reply.error = chunk["error"]
        return
    reply.usage = chunk.get("usage") or reply.usage
    for choice in chunk["choices"]:
        if text := choice["delta"].get("content"):
            reply.text += text
            reply.chunks.append(text)
        reply.finish_reason = choice.get("finish_reason") or reply.finish_reason


def data_url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(**flags: Any) -> Iterator[Stack]:
    settings, _ = load_settings(port=free_port(), log_level="warning", **flags)
    stack = Stack(settings)
    try:
        yield stack
    finally:
        stack.stop()


@pytest.fixture(scope="session")
def start_stack() -> Callable[..., Any]:
    """A context manager that runs a stack with the given settings."""
    return running


DOCKER = Path(__file__).parents[2] / "docker"
_VARIABLE = re.compile(r"\$(\$)|\$\{(\w+)(?::([-?])([^}]*))?\}")


def load_compose(*overrides: str, **variables: str) -> dict[str, Any]:
    """compose.yaml with the named overrides merged in and its variables substituted."""
    model: dict[str, Any] = {}
    for name in ("compose", *(f"compose.{override}" for override in overrides)):
        model = _merge(model, yaml.safe_load((DOCKER / f"{name}.yaml").read_text()))
    return _substitute(model, variables)


def _merge(base: Any, over: Any, key: str = "") -> Any:
    """Compose's rule: maps merge, lists grow, except the lists that are commands."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {k: _merge(base[k], v, k) if k in base else v for k, v in over.items()}
    if isinstance(base, list) and key not in ("command", "entrypoint", "test"):
        return base + over
    return over


def _substitute(value: Any, variables: dict[str, str]) -> Any:
    def replace(match: re.Match[str]) -> str:
        dollar, name, kind, default = match.groups()
        if not dollar and kind == "?" and not variables.get(name):
            raise KeyError(default)
        return "$" if dollar else variables.get(name) or default or ""

    if isinstance(value, dict):
        return {k: _substitute(v, variables) for k, v in value.items()}
    if isinstance(value, list):
        return [_substitute(v, variables) for v in value]
    return _VARIABLE.sub(replace, value) if isinstance(value, str) else value


@dataclass
class ContainerImage:
    """What a container of one target of the Dockerfile starts with."""

    environment: dict[str, str] = field(default_factory=dict)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    user: str = ""
    steps: list[str] = field(default_factory=list)

    def apply(self, instruction: str, argument: str) -> None:
        if instruction == "ENV":
            self.environment |= dict(pair.split("=", 1) for pair in argument.split())
        elif instruction == "HEALTHCHECK":
            self.healthcheck = ["CMD", *json.loads(argument.partition("CMD")[2])]
        elif instruction == "ENTRYPOINT":
            self.entrypoint = json.loads(argument)
        elif instruction == "CMD":
            self.command = json.loads(argument)
        elif instruction == "USER":
            self.user = argument
        elif instruction in ("RUN", "COPY"):
            self.steps.append(argument)


def load_images() -> dict[str, ContainerImage]:
    """The stages of the Dockerfile by name, each with what it inherits."""
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    images: dict[str, ContainerImage] = {}
    current = ContainerImage()
    for line in text.splitlines():
        instruction, _, argument = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = argument.partition(" AS ")
            current = images[name] = deepcopy(images.get(base, ContainerImage()))
        elif instruction and not instruction.startswith("#"):
            current.apply(instruction, argument.strip())
    return images


@pytest.fixture(scope="session")
def compose() -> Callable[..., dict[str, Any]]:
    """The compose file, merged and substituted."""
    return load_compose


@pytest.fixture(scope="session")
def images() -> dict[str, ContainerImage]:
    """The images of the Dockerfile by target."""
    return load_images()


class SwitchBench:
    """A small model, its pipelines in one process, and questions about numbered pictures."""

    config = EngineConfig(num_blocks=256, max_batched_tokens=64, max_num_seqs=32)

    def __init__(self, model: Path) -> None:
        self.card = ModelCard.load(model)
        self._count = itertools.count()

    def pipeline(self, topology: str, **options: Any) -> LocalPipeline:
        return LocalPipeline(str(self.card.path), topology, **{"config": self.config, **options})

    def request(self, *pictures: int, **sampling: Any) -> Submission:
        image = self.card.image_token_id or 0
        marks = [token for n in range(len(pictures)) for token in (20 + n, image)]
        sizes = [np.random.default_rng(seed).integers(20, 60, 2).tolist() for seed in pictures]
        return Submission(
            request_id=f"s{next(self._count)}", prompt_token_ids=[1, *marks, 30, 31, 32, 33],
            images=[ImagePixels(w, h, np.random.default_rng(seed).bytes(3 * w * h))
                    for seed, (w, h) in zip(pictures, sizes, strict=True)],
            sampling=SamplingParams(**{"max_tokens": 32, "ignore_eos": True, **sampling}),
            salt="", timeout_s=80.0,
        )  # fmt: skip

    async def undisturbed(self, requests: list[Submission]) -> list[list[TokenOutput]]:
        async with self.pipeline("1EPD") as pipeline:
            return await self.ask(pipeline, requests)

    async def ask(
        self, pipeline: LocalPipeline, requests: list[Submission], every: float = 0.0
    ) -> list[list[TokenOutput]]:
        """The answers to requests that arrive `every` so many seconds."""

        async def one(number: int, request: Submission) -> list[TokenOutput]:
            await asyncio.sleep(number * every)
            tokens, _ = await pipeline.run(request)
            assert [t.index for t in tokens] == list(range(len(tokens)))
            return tokens

        return await asyncio.gather(*(one(n, r) for n, r in enumerate(requests)))

    async def switch(
        self, pipeline: LocalPipeline, worker: str, stages: str, **options: Any
    ) -> SwitchRecord:
        options = {"drain_seconds": 20.0, **options}
        record = pipeline.dispatcher.roles.start(worker, parse_stages(stages), **options)
        await self.until(lambda: record.final)
        return record

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.002)

    async def produced(self, pipeline: LocalPipeline, request: Submission, count: int) -> None:
        records = pipeline.dispatcher._attempts.records
        await self.until(
            lambda: len(r.outputs if (r := records.get(request.request_id)) else ()) >= count
        )

    async def no_leaks(self, pipeline: LocalPipeline) -> None:
        """Every block, lease and queue is back where it started, every core consistent."""
        workers = pipeline.workers.values()
        idle = WorkerStats()
        queues = ("running", "kv_leases", "encode_queue", "prefill_waiting", "handoff_queue")
        async with asyncio.timeout(3.0):
            await self.until(lambda: all(
                s.blocks_free == s.blocks_total
                and all(getattr(s, name) == getattr(idle, name) for name in queues)
                for s in (worker.stats() for worker in workers)
            ))  # fmt: skip
        for worker in workers:
            assert worker.hosted.idle()
            if worker.hosted.loop is not None:
                worker.hosted.loop.core.check()


@pytest.fixture(scope="session")
def switch_bench(tmp_path_factory: pytest.TempPathFactory) -> SwitchBench:
    """One for all: it holds a model and nothing that changes."""
    path = tmp_path_factory.mktemp("tiny")
    return SwitchBench(write_tiny_llava(path, seed=3, num_kv_heads=2))
