"""`epd serve`: check what can be checked, start everything, say how to use it, stop cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
from typing import TYPE_CHECKING

from epd.cache.factory import open_cache
from epd.cache.server import find_server
from epd.demo import BUILT_IN_NAME, CHECKPOINT
from epd.errors import ConfigError
from epd.models.card import ModelCard
from epd.node import GATEWAY
from epd.roles import format_topology, parse_topology
from epd_services.cli.terminal import note, usage_error
from epd_services.client import chat_body
from epd_services.logs import configure_logs
from epd_services.settings import unknown_variables
from epd_services.stack import Stack, port_problem

if TYPE_CHECKING:
    from pathlib import Path

    from epd_services.settings import Settings

__all__ = ["preflight", "serve"]


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; the exit code: 0 after a drain, 1 if the gateway failed."""
    card = preflight(settings)
    configure_logs(settings.log_level, settings.log_format, worker="supervisor")
    return asyncio.run(_serve(settings, card))


def preflight(settings: Settings) -> ModelCard:
    """The model's card, after every check that needs no process. Raises `EPDError`."""
    try:
        parse_topology(settings.topology)
    except ConfigError as error:
        raise usage_error(
            f"Cannot serve with the topology {settings.topology[:32]!r}.", str(error),
            "epd serve --topology 1E1P1D",
        ) from None  # fmt: skip
    settings.check_http()
    if why := port_problem(settings.host, settings.port):
        raise usage_error(
            f"Cannot listen on {settings.host} port {settings.port}.", f"{why}.",
            f"epd serve --port {_other_port(settings)}",
        )  # fmt: skip
    card = ModelCard.load(
        settings.model or CHECKPOINT, name=None if settings.model else BUILT_IN_NAME
    )
    asyncio.run(_check_cache(settings.cache_url))
    for line in unknown_variables():
        note(f"warning: {line}")
    if settings.http_is_open:
        note(f"warning: anybody who reaches {settings.host} may use this; see --api-key-file")
    return card


def _other_port(settings: Settings) -> int:
    start = max(settings.port, 1024)
    ports = range(start + 1, min(start + 50, 65536))
    return next((p for p in ports if port_problem(settings.host, p) is None), 8000)


async def _check_cache(url: str | None) -> None:
    """Raise when the named token cache does not answer: later that would only be slow misses."""
    if url is None:
        return
    cache = open_cache(url, timeout=1.0)
    try:
        await cache.contains(["probe"])
        failed = cache.stats().errors > 0
    finally:
        await cache.close()
    if failed:
        raise usage_error(
            "Cannot reach the token cache.",
            "The server that --cache-url (or EPD_CACHE_URL) names does not answer, or refuses us.",
            "Start it, correct the URL, or leave it out: epd serve then runs a private one.",
        )


async def _serve(settings: Settings, card: ModelCard) -> int:
    stack = Stack(settings, keep=True)
    stop = _stop_signals(stack)
    starting = asyncio.create_task(stack.__aenter__())
    if not await _before(stop, starting):
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return 0
    starting.result()
    _announce(stack, card)
    code = await _watch(stack, stop)
    note("stopping: what is under way may finish (again: stop at once)")
    await stack.__aexit__(None, None, None)
    return code


def _stop_signals(stack: Stack) -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; the second ends everything at once."""
    stop = asyncio.Event()

    def stopping() -> None:
        if stop.is_set():
            stack.supervisor.kill()
            os._exit(130)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping)
    return stop


async def _before(stop: asyncio.Event, task: asyncio.Task[Stack]) -> bool:
    """Whether `task` ended before the stop."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    return task.done()


async def _watch(stack: Stack, stop: asyncio.Event) -> int:
    """Wait for the stop; the exit code. A worker that keeps failing is told once."""
    told: set[str] = set()
    while not stop.is_set():
        for name in set(stack.supervisor.failed) - told:
            told.add(name)
            note(f"{name} keeps failing; tried every half minute; see {stack.run_dir / name}.log")
        if GATEWAY in told:
            return 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.5)
    return 0


def _announce(stack: Stack, card: ModelCard) -> None:
    settings = stack.settings
    topology = format_topology(parse_topology(settings.topology))
    print(f"\nServing {settings.model_name or card.name} as {topology} on {stack.url}")
    print(f"  try it:  {_curl(stack)}")
    print(f"  logs:    {stack.run_dir}/*.log")
    print(f"  cache:   {_cache_words(settings)}")
    print(f"  roles:   epd admin --run-dir {shlex.quote(str(stack.run_dir))} status")
    print("  stop:    Ctrl-C lets requests finish; twice stops at once", flush=True)


def _cache_words(settings: Settings) -> str:
    if settings.cache_url is not None:
        return "the server of --cache-url" if "memory:" not in settings.cache_url else "in-process"
    server = find_server()
    if server is not None:
        return f"a private {os.path.basename(str(server))}"
    return "in each process (no redis-server or valkey-server on PATH; epd doctor says more)"


def _curl(stack: Stack) -> str:
    """A command that works as it stands; the body lies in a file, to keep the line short."""
    body = stack.run_dir / "request.json"
    question = "What color is the circle?"
    image = _example_picture(stack.run_dir / "example.png")
    body.write_text(json.dumps(chat_body(question, [image], max_tokens=64)))
    key = ""
    if (file := stack.settings.api_key_file) is not None:
        key = f"-H \"authorization: Bearer $(grep -m1 '^[^#]' {shlex.quote(str(file))})\" "
    return (
        f"curl -s {stack.url}/v1/chat/completions -H 'content-type: application/json' "
        f"{key}-d @{shlex.quote(str(body))}"
    )


def _example_picture(path: Path) -> bytes:
    """PNG bytes of a red circle, also left at `path`."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (224, 224), (225, 225, 220))
    ImageDraw.Draw(picture).ellipse((70, 60, 154, 144), fill=(220, 40, 40))
    picture.save(path)
    return path.read_bytes()
