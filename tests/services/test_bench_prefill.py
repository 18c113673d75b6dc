"""The prefill benchmark on a tiny shape: what enters the decoder, and that it times every pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from epd_services.prefill_bench import CASES, run_prefill_bench
from epd_services.prefill_pipeline import PrefillPipeline

SHAPES = Path(__file__).parents[2] / "docs" / "bench" / "configs" / "llava-1.5-7b"


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("CI", "1")
    enabled = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(enabled)


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    config = json.loads((SHAPES / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
                              "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_every_case_is_measured_dense_and_pruned(config_dir: Path) -> None:
    rows = run_prefill_bench(config_dir, device="cpu", batches=(2,), text_tokens=8, repeats=1)
    found = {(row["case"], row["method"]): row["tokens"] for row in rows}
    assert found == {
        ("llava-1.5-7b", "dense"): 2 * (576 + 8),
        ("llava-1.5-7b", "adaptinfer llava-1.5-7b/64"): 2 * (576 + 8),
        ("llava-1.5-7b", "script 64x1"): 2 * (64 + 8),
        ("llava-next-7b", "dense"): 2 * (2880 + 8),
        ("llava-next-7b", "script 64x5"): 2 * (320 + 8),
    }
    assert all(row["prefill"] > 0 for row in rows)
    assert rows[0]["command"].endswith("--batches 2 --text-tokens 8 --repeats 1 --seed 0")
    assert all(row["times"] == 1.0 for row in rows if row["method"] == "dense")


def test_the_schedule_is_the_published_one(config_dir: Path) -> None:
    pipeline = PrefillPipeline(config_dir, device="cpu", dtype=torch.float32, seed=0)
    _, pruned = pipeline.open(CASES[0], 1, text_tokens=8)
    pipeline._add(pruned, pruned.images[0], None)
    (sequence,) = pruned.core._scheduler.sequences.values()
    assert sequence.schedule is not None
    assert sequence.schedule.layers == (1, 10, 20)
    assert sequence.schedule.counts == (133, 27, 3)
