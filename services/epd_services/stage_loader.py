"""Loads and unloads what the stages of one worker need, and nothing else.

E needs the vision encoder; P and D need the decoder and a KV pool; P also needs the text tower, if
the checkpoint has one. What a new role does not need rests in host memory within a limit, or is
dropped and read from disk again.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import torch
from torch import nn

from epd.config import EngineConfig
from epd.core import EngineCore
from epd.errors import ConfigError, InvalidRequestError, RoleError
from epd.graphs import default_recorder
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.query import QueryEncoder
from epd.models.vision import VisionEncoder
from epd.pruning_spec import PruningSpec
from epd.roles import Stage, StageSet
from epd.selection_warm_up import warm_up_choice, warm_up_encoder
from epd.stages.encode import MAX_BATCH
from epd.stages.parts import StageParts
from epd.vision_pool import TokenSelector, check_pruning
from epd_services.warm_weights import Component, WarmWeights

__all__ = ["ModelLoader"]

_ENCODER, _DECODER, _QUERIES = "encoder", "decoder", "queries"


class ModelLoader:
    """The `StageLoader` of one checkpoint on one device.

    `encoder` and `decoder` make the two models; left out, they are read from the checkpoint.
    `default_pruning` must be possible for every role. `warm_bytes` is the limit of host memory for
    weights at rest.
    """

    def __init__(
        self,
        card: ModelCard,
        *,
        device: str,
        dtype: torch.dtype,
        config: EngineConfig,
        warm_bytes: int = 0,
        default_pruning: PruningSpec | None = None,
        encoder: Callable[[], VisionEncoder] | None = None,
        decoder: Callable[[], Decoder] | None = None,
    ) -> None:
        self._card = card
        self._device = device
        self._config = config
        self._default_pruning = default_pruning
        self._make_encoder = encoder or (lambda: VisionEncoder.load(card, device, dtype))
        self._make_decoder = decoder or (lambda: Decoder.load(card, device, dtype))
        self._loaded: dict[str, Component] = {}
        self._core: EngineCore | None = None
        self._compiled = self._encoded = False  # whether a decoder, an encoder was here before
        self._chosen: set[str] = set()  # parts that chose vision tokens once
        self._selector: TokenSelector | None = None
        self.warm = WarmWeights(warm_bytes, device)
        self._turn = threading.Lock()  # warming up runs beside switches

    @property
    def parts(self) -> StageParts:
        """What is loaded now."""
        encoder = self._loaded.get(_ENCODER)
        return StageParts(encoder.value if encoder else None, self._core, self._selector)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights that are loaded now; neither KV nor weights at rest."""
        return sum(component.num_bytes for component in self._loaded.values())

    def check(self, stages: StageSet) -> None:
        """Raise `RoleError` for no stage at all; one checkpoint has all three."""
        if not stages:
            raise RoleError("a worker needs a stage")

    def unload(self, stages: StageSet) -> None:
        """Drop what `stages` do not need: weights go to rest or are forgotten, pools are freed."""
        with self._turn, torch.no_grad():
            self._unload(stages)

    def _unload(self, stages: StageSet) -> None:
        needed = _needs(stages)
        dropped = [
            n for n in (_QUERIES, _ENCODER, _DECODER) if n in self._loaded and n not in needed
        ]
        freed = sum(self._loaded[name].num_bytes for name in dropped)
        if _QUERIES in dropped:
            self._selector = None
        if _DECODER in dropped:
            self._core = None
        if _ENCODER in dropped:
            self._loaded[_ENCODER].value.repeat_with(None)
        for name in dropped:
            self._rest(self._loaded.pop(name))
        if freed and self._device.startswith("cuda"):
            gc.collect()
            torch.cuda.empty_cache()

    def _rest(self, component: Component) -> None:
        if not self.warm.keep(component) and component.name == _DECODER:
            self.warm.forget(_QUERIES)  # they embed with this very decoder

    def load(self, stages: StageSet) -> None:
        """Load what `stages` need and is missing. Raises `CheckpointError` and `ConfigError`."""
        with self._turn, torch.no_grad():
            self._load(stages)

    def _load(self, stages: StageSet) -> None:
        needed = _needs(stages)
        if _ENCODER in needed and _ENCODER not in self._loaded:
            recorder = default_recorder(self._device, graphs=self._config.cuda_graphs)
            self._have(_ENCODER).value.repeat_with(recorder, at_once=not self._encoded)
            self._encoded = True
        if _DECODER in needed:
            decoder = self._have(_DECODER).value
            if self._core is None:
                self._core = EngineCore(
                    decoder, self._card, config=self._config, device=self._device
                )
                self._core.warm_up(compiled=self._compiled)
                self._compiled = True
        if _QUERIES in needed and self._selector is None:
            self._selector = TokenSelector(self._have(_QUERIES).value)
        self._check_pruning()
        self._warm_up_choice()

    def import_models(self) -> None:
        """Import all that any part takes: seconds that a switch would have to wait for."""
        if _ENCODER not in self._loaded:
            VisionEncoder(self._card, "meta", torch.float32)

    def warm_up(self) -> int:
        """Put what a later role may need into host memory, as far as it surely fits; bytes held."""
        for name in (_DECODER, _ENCODER):
            with self._turn, torch.no_grad():
                self._warm(name)
        return self.warm.used

    def _warm(self, name: str) -> None:
        component = self._loaded.get(name)
        if component is None and not self.warm.rests(name):
            files = sum(file.stat().st_size for file in self._card.path.glob("*.safetensors"))
            if self.warm.used + files <= self.warm.limit:
                self.warm.keep(self._make(name))
        elif component is not None and self._device.startswith("cuda"):
            self.warm.prepare(component)

    def _have(self, name: str) -> Component:
        if name not in self._loaded:
            self._loaded[name] = self.warm.take(name) or self._make(name)
        return self._loaded[name]

    def _make(self, name: str) -> Component:
        modules: tuple[nn.Module, ...]
        if name == _ENCODER:
            encoder = self._make_encoder()
            modules, size = (encoder.tower, encoder.projector), encoder.resident_bytes()
            return Component(name=name, value=encoder, modules=modules, num_bytes=size)
        if name == _DECODER:
            decoder = self._make_decoder()
            size = decoder.resident_bytes()
            return Component(name=name, value=decoder, modules=(decoder,), num_bytes=size)
        queries = QueryEncoder(self._card, self._loaded[_DECODER].value)
        modules = (queries.tower.model,) if queries.tower is not None else ()
        size = queries.resident_bytes()
        return Component(name=name, value=queries, modules=modules, num_bytes=size)

    def _warm_up_choice(self) -> None:
        """Have the choice of vision tokens compiled, the first time that each half is here."""
        if _ENCODER in self._loaded and _ENCODER not in self._chosen:
            warm_up_encoder(self._loaded[_ENCODER].value, MAX_BATCH)
        if _QUERIES in self._loaded and _QUERIES not in self._chosen:
            queries, decoder = self._loaded[_QUERIES].value, self._loaded[_DECODER].value
            warm_up_choice(queries, decoder, self._card.image_tokens)
        self._chosen |= self._loaded.keys()

    def _check_pruning(self) -> None:
        if self._default_pruning is None:
            return
        encoder, queries = self._loaded.get(_ENCODER), self._loaded.get(_QUERIES)
        try:
            check_pruning(
                self._default_pruning,
                encoder.value if encoder else None,
                queries.value if queries else None,
            )
        except InvalidRequestError as error:
            raise ConfigError(f"the default pruning cannot be served: {error}") from None


def _needs(stages: StageSet) -> set[str]:
    """The names of what `stages` need."""
    needed = set()
    if Stage.ENCODE in stages:
        needed.add(_ENCODER)
    if stages & {Stage.PREFILL, Stage.DECODE}:
        needed.add(_DECODER)
    if Stage.PREFILL in stages:
        needed.add(_QUERIES)
    return needed
