"""Choosing vision tokens on a GPU compiles nothing once it was warmed up, before the decoder or
inside it.
"""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epd.config import EngineConfig
from epd.core import EngineCore, NewSequence
from epd.graphs import default_recorder
from epd.models.decoder import Decoder, DecoderConfig
from epd.request import SamplingParams
from epd.selection_warm_up import warm_up_choice, warm_up_encoder
from epd_pruning import available, layer_pruner
from epd_pruning.schedule import Schedule

from .selection_traffic import Halves

pytestmark = pytest.mark.gpu

KERNELS = ("cosines", "graph_score", "greedy_dpp", "relevance", "row_keep", "row_sort",
           "text_votes")  # fmt: skip
IMAGE = 3
CONFIG = DecoderConfig(
    vocab_size=997, hidden_size=512, intermediate_size=1024, num_layers=4, num_heads=4,
    num_kv_heads=2, head_dim=128, max_position=4096,
)  # fmt: skip


@pytest.fixture(autouse=True)
def device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(autouse=True)
def forgotten(device: None) -> None:
    """No kernel is in this process at first: what is taken from a cache counts as compiled."""
    for module in KERNELS:
        for value in vars(importlib.import_module(f"epd_kernels.{module}")).values():
            if hasattr(value, "device_caches"):
                value.device_caches.clear()


@pytest.mark.parametrize("tower", [True, False])
@pytest.mark.parametrize("side", [5, 24, 27])
def test_methods_before_the_decoder(
    side: int, tower: bool, compiled: list[str], tmp_path: Path
) -> None:
    halves = Halves.write(tmp_path, side, "cuda", torch.bfloat16, tower=tower)
    halves.encoder.repeat_with(default_recorder("cuda", graphs=True))
    warm_up_encoder(halves.encoder, 8)
    warm_up_choice(halves.queries, halves.decoder, halves.num_tokens)
    assert 15 <= len(compiled) <= 22
    compiled.clear()
    source = random.Random(side)
    served = {method for _ in range(60) for method in halves.serve(source)}
    assert served == set(available("token"))
    assert compiled == []


@pytest.mark.parametrize("method", available("layer"))
def test_methods_inside_the_decoder(method: str, compiled: list[str]) -> None:
    card: Any = SimpleNamespace(
        revision="r1", eos_token_ids=(2,), max_position=4096, path=Path("absent")
    )
    core = EngineCore(
        Decoder.random(CONFIG, "cuda", torch.bfloat16, seed=3), card, device="cuda",
        config=EngineConfig(num_blocks=1200, max_num_seqs=6, max_batched_tokens=1500),
        layer_pruner=layer_pruner(method, Schedule((0, 2), ratios=(0.5, 0.2), of="original")),
    )  # fmt: skip
    core.warm_up()
    assert compiled
    compiled.clear()
    source = random.Random(method)
    for number in range(30):
        _add(core, f"r{number}", source)
        for _ in range(source.randint(0, 4)):
            assert not core.step().failed
    while core.has_work():
        assert not core.step().failed
    assert compiled == []


def _add(core: EngineCore, name: str, source: random.Random) -> None:
    images = source.choice((0, 1, 1, 2))
    text, sizes = source.randint(1, 300), [source.randint(1, 600) for _ in range(images)]
    ids = [4, *[IMAGE] * images, *(source.randrange(4, 997) for _ in range(text))]
    vision = [torch.randn(size, 512, device="cuda", dtype=torch.bfloat16) for size in sizes]
    core.add(
        NewSequence(
            request_id=name, attempt=0, prompt_token_ids=ids, image_token_id=IMAGE,
            mm_keys=[f"{name}{place}" for place in range(images)],
            sampling=SamplingParams(max_tokens=4, ignore_eos=True),
            layer_keep=source.choice((None, 0.3, 0.6)) if images else None,
        ),
        vision,
    )  # fmt: skip
