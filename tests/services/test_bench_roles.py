"""The role benchmark on a tiny shape: every change is made, and no role holds another's weights."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from epd_services.role_bench import WALK, role_loader, run_role_bench

SHAPES = Path(__file__).parents[2] / "docs" / "bench" / "configs" / "llava-1.5-7b"


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    config = json.loads((SHAPES / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
                              "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    config["vision_config"] |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
                                "num_attention_heads": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_every_change_is_timed_and_a_role_holds_its_own_weights_only(
    config_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = tmp_path_factory.mktemp("copy")
    loader = role_loader(config_dir, copy, device="cpu", dtype=torch.float32, seed=1,
                         warm_bytes=1 << 30, blocks=8)  # fmt: skip
    rows = run_role_bench(loader, device="cpu")
    assert [(row["old"], row["new"]) for row in rows] == list(pairwise(WALK))[2:]
    held = {row["new"]: row["resident_gb"] for row in rows}
    assert held["E"] + held["D"] == pytest.approx(held["EPD"])
    assert 0 < held["E"] < held["D"]
    assert all(row["total_s"] == row["unload_s"] + row["load_s"] for row in rows)
