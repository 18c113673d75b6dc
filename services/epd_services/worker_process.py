"""The process of one worker: load what its stages need, serve, drain on SIGTERM, end with a
truthful exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path

import structlog
import torch

from epd.cache.factory import open_cache
from epd.errors import ConfigError, EPDError
from epd.failpoints import Failpoints
from epd.models.card import ModelCard
from epd.node import Identity, Node
from epd.roles import StageSet, format_stages
from epd.tensors import dtype_name, torch_dtype
from epd.transport import ZmqTransport, reachable
from epd.wire import Codec
from epd.worker import ServedModel, Worker
from epd_services.logs import configure_logs
from epd_services.process import ended_before_stop
from epd_services.settings import Settings
from epd_services.stage_loader import ModelLoader

__all__ = ["run_worker"]

_log = structlog.get_logger("epd.worker")


def run_worker(settings: Settings, name: str, stages: StageSet) -> int:
    """Serve until SIGTERM; the exit code: 0 after a drain, 1 when a stage broke."""
    configure_logs(settings.log_level, settings.log_format, worker=name)
    torch.set_num_threads(settings.threads)
    torch.set_grad_enabled(False)
    if settings.gateway_address is None or settings.bind is None:
        raise ConfigError("a worker needs EPD_GATEWAY_ADDRESS and EPD_BIND")
    return asyncio.run(_serve(settings, name, stages))


def _loader(settings: Settings, card: ModelCard) -> ModelLoader:
    device = resolve_device(settings.device)
    return ModelLoader(
        card,
        device=device,
        dtype=resolve_dtype(settings.dtype, device),
        config=settings.engine(),
        warm_bytes=settings.warm_bytes,
        default_pruning=settings.pruning_policy(card).default,
    )


def resolve_device(name: str) -> str:
    """The device to use: `auto` is cuda when there is one. Raises `ConfigError` for an unusable
    one.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name} was asked for, but this machine has no usable GPU")
    return name


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The dtype to compute in: `auto` is float32 on the CPU and bfloat16 on a GPU."""
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return torch_dtype(name)


async def _serve(settings: Settings, name: str, stages: StageSet) -> int:
    assert settings.bind is not None and settings.gateway_address is not None
    key = settings.wire_key()
    from epd.demo import CHECKPOINT

    card = ModelCard.load(settings.model or CHECKPOINT)
    device = resolve_device(settings.device)
    loader = _loader(settings, card)
    loader.load(stages)
    loader.import_models()
    transport = ZmqTransport(settings.bind, keyed=key is not None)
    cache = open_cache(
        settings.cache_url,
        max_bytes=settings.cache_bytes,
        max_entry_bytes=settings.cache_entry_bytes,
        ttl=settings.cache_ttl,
    )
    dtype = dtype_name(resolve_dtype(settings.dtype, device))
    worker = Worker(
        Node(Identity(name, time.time_ns(), format_stages(stages)), transport, Codec(key)),
        ServedModel(card.revision, card.encoder_revision, dtype, card.image_token_id),
        gateway=settings.gateway_address,
        cache=cache,
        loader=loader,
        clock=time.monotonic,
        device=device,
        address=settings.advertise or reachable(transport.address, os.uname().nodename),
        failpoints=Failpoints.parse(settings.failpoints),
    )
    _log.info("ready", stages=format_stages(stages), resident_bytes=loader.resident_bytes)
    serving = asyncio.create_task(worker.run())
    warming = asyncio.create_task(_warm_up(loader))
    sign = asyncio.create_task(_show_life(settings.health_file))
    if await ended_before_stop(serving):
        _log.error("a stage broke", error=repr(serving.exception())[:200])
        return 1
    await worker.drain(settings.drain_seconds)
    for task in (serving, sign, warming):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await cache.close()
    transport.close()
    return 0


async def _warm_up(loader: ModelLoader) -> None:
    """Have the weights of other roles in host memory before anybody asks for them."""
    try:
        held = await asyncio.to_thread(loader.warm_up)
    except (EPDError, RuntimeError) as error:
        _log.warning("no weights kept warm", error=str(error)[:200])
    else:
        _log.info("weights kept warm", bytes=held)


async def _show_life(file: Path | None) -> None:
    """Touch `file` every second, from the event loop that the heartbeats come from."""
    while file is not None:
        with contextlib.suppress(OSError):
            file.touch()
        await asyncio.sleep(1.0)
