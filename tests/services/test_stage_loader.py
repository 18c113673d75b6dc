"""What a role holds: only its own weights, and those of others at rest within a limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from epd.config import EngineConfig
from epd.core import EngineCore
from epd.demo import CHECKPOINT
from epd.errors import CheckpointError, RoleError
from epd.graphs import CalledAgain
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.vision import VisionEncoder
from epd.roles import format_stages, parse_stages
from epd.selection_warm_up import encoder_runs, run_all
from epd_pruning.dart import Dart
from epd_services.settings import load_settings
from epd_services.stage_loader import ModelLoader
from epd_services.warm_weights import Component, WarmWeights

SETS = ["E", "P", "D", "EP", "ED", "PD", "EPD"]
CONFIG = EngineConfig(num_blocks=8)


@pytest.fixture(scope="module")
def card() -> ModelCard:
    return ModelCard.load(CHECKPOINT)


class Counting(ModelLoader):
    """Counts what is read from disk."""

    def __init__(self, card: ModelCard, warm_bytes: int = 0) -> None:
        self.read: list[str] = []
        self.broken = False
        super().__init__(
            card, device="cpu", dtype=torch.float32, config=CONFIG, warm_bytes=warm_bytes,
            encoder=self._encoder, decoder=self._decoder,
        )  # fmt: skip
        self.card = card

    def _encoder(self) -> VisionEncoder:
        self.read.append("encoder")
        if self.broken:
            raise CheckpointError("the disk is gone")
        return VisionEncoder.load(self.card)

    def _decoder(self) -> Decoder:
        self.read.append("decoder")
        return Decoder.load(self.card)


def stored_bytes(path: Path) -> dict[str, int]:
    """Bytes in fp32 of the two halves of the checkpoint's own files."""
    from safetensors import safe_open

    sizes = {"vision": 0, "language": 0}
    for file in sorted(path.glob("model-*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                vision = "vision_tower" in name or "multi_modal_projector" in name
                count = torch.Size(tensors.get_slice(name).get_shape()).numel()
                sizes["vision" if vision else "language"] += 4 * count
    return sizes


def test_a_role_holds_only_its_own_weights(
    card: ModelCard, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {}
    for letters in SETS:
        loader = ModelLoader(card, device="cpu", dtype=torch.float32, config=CONFIG)
        loader.load(parse_stages(letters))
        held[letters] = loader.resident_bytes
    files = stored_bytes(Path(card.path))
    with capsys.disabled():
        whole = sum(files.values())
        print()
        for letters, size in held.items():
            print(f"resident {letters:>3}: {size:>11,} bytes, {size / whole:6.1%} of the model")
    assert 0 < held["E"] <= files["vision"]
    assert 0 < held["D"] <= files["language"]
    assert held["ED"] == held["E"] + held["D"]
    tower = held["P"] - held["D"]
    assert 0 <= tower < held["D"]
    assert held["EPD"] == held["EP"] == held["E"] + held["P"]
    assert held["PD"] == held["P"]


@pytest.mark.parametrize("warm_bytes", [0, 1 << 30])
@pytest.mark.parametrize("old", SETS)
def test_every_switch_ends_with_what_a_fresh_start_has(
    card: ModelCard, old: str, warm_bytes: int
) -> None:
    loader = Counting(card, warm_bytes)
    loader.load(parse_stages(old))
    for new in SETS:
        before = loader.parts
        loader.unload(parse_stages(new))
        loader.load(parse_stages(new))
        parts = loader.parts
        assert (parts.encoder is not None) == ("E" in new)
        assert (parts.core is not None) == bool({"P", "D"} & set(new))
        assert (parts.selector is not None) == ("P" in new)
        if before.core is not None and {"P", "D"} & set(new):
            assert parts.core is before.core
        fresh = ModelLoader(card, device="cpu", dtype=torch.float32, config=CONFIG)
        fresh.load(parse_stages(new))
        assert loader.resident_bytes == fresh.resident_bytes
    if warm_bytes:
        assert sorted(loader.read) == sorted(set(loader.read))
    else:
        assert loader.warm.used == 0


def test_weights_at_rest_stay_within_the_limit(card: ModelCard) -> None:
    probe = Counting(card)
    probe.load(parse_stages("E"))
    limit = probe.resident_bytes
    loader = Counting(card, limit)
    for _ in range(2):  # the encoder may rest, the decoder has no room
        for letters in ("E", "D"):
            loader.unload(parse_stages(letters))
            loader.load(parse_stages(letters))
            assert loader.warm.used <= limit
    assert loader.read == ["encoder", "decoder", "decoder"]


def test_warming_up_reads_what_other_roles_need_ahead_of_any_switch(card: ModelCard) -> None:
    loader = Counting(card, 1 << 30)
    loader.load(parse_stages("D"))
    held = loader.resident_bytes
    loader.import_models()
    assert loader.warm_up() > 0
    assert (loader.read, loader.resident_bytes) == (["decoder", "encoder"], held)
    loader.unload(parse_stages("E"))
    loader.load(parse_stages("E"))
    assert loader.read == ["decoder", "encoder"]
    small = Counting(card, 1 << 20)
    small.load(parse_stages("D"))
    assert (small.warm_up(), small.read) == (0, ["decoder"])


def test_a_failed_load_leaves_the_way_back_open(card: ModelCard) -> None:
    loader = Counting(card)
    loader.load(parse_stages("PD"))
    held, core = loader.resident_bytes, loader.parts.core
    loader.broken = True
    loader.unload(parse_stages("EPD"))
    with pytest.raises(CheckpointError):
        loader.load(parse_stages("EPD"))
    loader.unload(parse_stages("PD"))
    loader.load(parse_stages("PD"))
    assert (loader.resident_bytes, loader.parts.core) == (held, core)
    with pytest.raises(RoleError):
        loader.check(frozenset())
    assert format_stages(parse_stages("PD")) == "PD"


def test_a_component_without_room_is_not_kept() -> None:
    def component(name: str, size: int) -> Component:
        return Component(name=name, value=name, modules=(), num_bytes=size)

    warm = WarmWeights(100, "cpu")
    assert warm.keep(component("a", 60))
    assert not warm.keep(component("b", 50))
    assert (warm.used, warm.rests("a"), warm.rests("b")) == (60, True, False)
    taken = warm.take("a")
    assert taken is not None
    assert (warm.used, warm.take("a"), warm.take("b")) == (0, None, None)
    assert warm.keep(component("b", 100))
    warm.forget("b")
    assert (warm.used, warm.rests("b")) == (0, False)


def test_a_core_is_warm_when_its_role_is_loaded(
    card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[tuple[EngineCore | None, bool]] = []
    monkeypatch.setattr(
        EngineCore, "warm_up", lambda core, *, compiled: warmed.append((core, compiled))
    )
    loader = Counting(card, warm_bytes=1 << 30)
    cores = []
    for letters, count in (("E", 0), ("ED", 1), ("D", 1), ("E", 1), ("PD", 2)):
        loader.unload(parse_stages(letters))
        loader.load(parse_stages(letters))
        cores.append(loader.parts.core)
        assert len(warmed) == count
    # what one core had compiled is there for the next
    assert warmed == [(cores[1], False), (cores[4], True)]


def test_graphs_are_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings()[0].engine().cuda_graphs
    monkeypatch.setenv("EPD_CUDA_GRAPHS", "0")
    monkeypatch.setenv("EPD_GRAPH_MEMORY_BYTES", "1000")
    engine = load_settings()[0].engine()
    assert (engine.cuda_graphs, engine.graph_memory_bytes) == (False, 1000)


def test_recordings_of_the_tower_never_outlive_where_its_weights_lie(
    card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their kernels hold addresses: weights that rest or come back lie elsewhere."""
    made: list[bool] = []
    real = VisionEncoder.repeat_with

    def repeat_with(self: VisionEncoder, recorder: Any, *, at_once: bool = True) -> None:
        if recorder is not None:
            made.append(at_once)
        real(self, recorder, at_once=at_once)

    monkeypatch.setattr(VisionEncoder, "repeat_with", repeat_with)
    monkeypatch.setattr(
        "epd_services.stage_loader.default_recorder", lambda *_, **__: CalledAgain("cpu")
    )
    loader = Counting(card, warm_bytes=1 << 30)
    loader.load(parse_stages("E"))
    encoder = loader.parts.encoder
    assert isinstance(encoder, VisionEncoder) and encoder._graphs is not None
    first = encoder._graphs
    loader.unload(parse_stages("D"))
    assert encoder._graphs is None
    loader.load(parse_stages("E"))
    assert encoder._graphs is not None and encoder._graphs is not first
    loader.load(parse_stages("EPD"))  # nothing moved
    assert made == [True, False]


def test_choosing_is_warmed_up_once_for_each_half(
    card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for half in ("encoder", "choice"):
        monkeypatch.setattr(
            f"epd_services.stage_loader.warm_up_{half}", lambda *_, half=half: done.append(half)
        )
    loader = ModelLoader(card, device="cpu", dtype=torch.float32, config=CONFIG)
    seen = []
    for letters in ("E", "D", "P", "E", "EPD"):
        loader.unload(parse_stages(letters))
        loader.load(parse_stages(letters))
        seen.append(done.copy())
    assert seen == [["encoder"], ["encoder"], *[["encoder", "choice"]] * 3]


def test_a_method_that_cannot_be_run_stops_no_worker(
    card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dart, "rank_image", lambda *_: 1 / 0)
    monkeypatch.setattr(
        "epd_services.stage_loader.warm_up_encoder",
        lambda encoder, _: run_all("encode", encoder_runs(encoder, 1)),
    )
    loader = ModelLoader(card, device="cpu", dtype=torch.float32, config=CONFIG)
    with capture_logs() as logs:
        loader.load(parse_stages("E"))
    assert loader.parts.encoder is not None
    assert [log["method"] for log in logs if log["log_level"] == "error"] == ["dart"]


@pytest.mark.gpu
def test_on_a_gpu_weights_rest_in_pinned_memory_and_come_back_whole(card: ModelCard) -> None:
    loader = ModelLoader(
        card, device="cuda", dtype=torch.float32, config=CONFIG, warm_bytes=1 << 30
    )
    loader.load(parse_stages("PD"))
    core = loader.parts.core
    assert core is not None
    before = {name: tensor.cpu() for name, tensor in core._runner._decoder.state_dict().items()}
    del core
    held = torch.cuda.memory_allocated()
    assert loader.warm_up() > 0
    loader.unload(parse_stages("E"))
    assert torch.cuda.memory_allocated() < held - loader.resident_bytes
    loader.load(parse_stages("E"))
    loader.unload(parse_stages("D"))
    loader.load(parse_stages("D"))
    assert loader.parts.core is not None
    after = loader.parts.core._runner._decoder.state_dict()
    assert all(after[name].is_cuda and torch.equal(after[name].cpu(), before[name])
               for name in before)  # fmt: skip
