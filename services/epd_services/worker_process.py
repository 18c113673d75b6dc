"""The process of one worker: load what its stages need, serve, drain on SIGTERM, end with a
truthful exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from epd.cache.factory import open_cache
from epd.core import EngineCore
from epd.errors import ConfigError, InvalidRequestError
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.query import QueryEncoder
from epd.models.vision import VisionEncoder
from epd.node import Identity, Node
from epd.roles import Stage, StageSet, format_stages
from epd.tensors import dtype_name, torch_dtype
from epd.transport import ZmqTransport, reachable
from epd.vision_pool import TokenSelector, check_pruning
from epd.wire import Codec
from epd.worker import ServedModel, Worker
from epd_services.logs import configure_logs
from epd_services.process import ended_before_stop
from epd_services.settings import Settings

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


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What the stages of a worker need, as far as they need it."""

    served: ServedModel
    device: str
    encoder: VisionEncoder | None
    core: EngineCore | None
    selector: TokenSelector | None


def _load(settings: Settings, stages: StageSet) -> _Loaded:
    from epd.demo import CHECKPOINT

    card = ModelCard.load(settings.model or CHECKPOINT)
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    encoder = core = queries = None
    resident = 0
    if Stage.ENCODE in stages:
        encoder = VisionEncoder.load(card, device, dtype)
        resident += encoder.resident_bytes()
    if stages & {Stage.PREFILL, Stage.DECODE}:
        decoder = Decoder.load(card, device, dtype)
        resident += sum(p.nbytes for p in decoder.parameters())
        core = EngineCore(decoder, card, config=settings.engine(), device=device)
        if Stage.PREFILL in stages:
            queries = QueryEncoder(card, decoder)
            resident += queries.resident_bytes()
    default = settings.pruning_policy(card).default
    if default is not None:
        try:
            check_pruning(default, encoder, queries)
        except InvalidRequestError as error:
            raise ConfigError(f"the default pruning cannot be served: {error}") from None
    served = ServedModel(
        card.revision, card.encoder_revision, dtype_name(dtype), card.image_token_id, resident
    )
    selector = TokenSelector(queries) if queries is not None else None
    return _Loaded(served, device, encoder, core, selector)


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
    loaded = _load(settings, stages)
    transport = ZmqTransport(settings.bind, keyed=key is not None)
    identity = Identity(name, time.time_ns(), format_stages(stages))
    cache = open_cache(
        settings.cache_url,
        max_bytes=settings.cache_bytes,
        max_entry_bytes=settings.cache_entry_bytes,
        ttl=settings.cache_ttl,
    )
    worker = Worker(
        Node(identity, transport, Codec(key)),
        loaded.served,
        gateway=settings.gateway_address,
        cache=cache,
        encoder=loaded.encoder,
        core=loaded.core,
        selector=loaded.selector,
        clock=time.monotonic,
        device=loaded.device,
        address=settings.advertise or reachable(transport.address, os.uname().nodename),
    )
    _log.info("ready", stages=format_stages(stages), resident_bytes=loaded.served.resident_bytes)
    serving = asyncio.create_task(worker.run())
    sign = asyncio.create_task(_show_life(settings.health_file))
    if await ended_before_stop(serving):
        _log.error("a stage broke", error=repr(serving.exception())[:200])
        return 1
    await worker.drain(settings.drain_seconds)
    for task in (serving, sign):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await cache.close()
    transport.close()
    return 0


async def _show_life(file: Path | None) -> None:
    """Touch `file` every second, from the event loop that the heartbeats come from."""
    while file is not None:
        with contextlib.suppress(OSError):
            file.touch()
        await asyncio.sleep(1.0)
