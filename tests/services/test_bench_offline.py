"""The offline benchmark on a tiny shape, and the reference runs on a tiny checkpoint."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from epd.core import EngineCore
from epd.errors import CheckpointError, ConfigError
from epd.kv.pool import KVPool
from epd.models.card import ModelCard
from epd.models.tiny import write_tiny_llava
from epd_services import offline_bench
from epd_services.bench_load import Picture
from epd_services.bench_reference import expected_answers, generate_sequentially
from epd_services.offline_bench import Workload, run_offline_bench
from epd_services.offline_pipeline import OfflinePipeline, Sizes

SHAPES = Path(__file__).parents[2] / "docs" / "bench" / "configs" / "llava-1.5-7b"
ABSENT = ("zmq", "redis", "fastapi", "pydantic", "pydantic_settings", "uvicorn", "httpx")
TINY = Workload(
    image_counts=(1, 2), repeats=2, batches=(1, 3), decode_steps=5, requests=5, outputs=(2, 4),
    text_tokens=8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("CI", "1")
    enabled, threads = torch.is_grad_enabled(), torch.get_num_threads()
    yield
    torch.set_grad_enabled(enabled)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare config directory, shaped like the one in docs/bench but tiny."""
    directory = tmp_path_factory.mktemp("tiny-shape")
    config = json.loads((SHAPES / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                              "num_attention_heads": 4, "num_key_value_heads": 4,
                              "head_dim": 16}  # fmt: skip
    config["vision_config"] |= {"hidden_size": 32, "intermediate_size": 48, "image_size": 28,
                                "num_hidden_layers": 3, "num_attention_heads": 4,
                                "patch_size": 7}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_shapes_in_the_docs_are_those_of_llava_7b() -> None:
    card = ModelCard.load(SHAPES, weights=False)
    text = card.text
    assert (text.num_layers, text.hidden_size, text.intermediate_size) == (32, 4096, 11008)
    assert (text.num_heads, text.num_kv_heads, text.head_dim) == (32, 32, 128)
    assert (text.vocab_size, card.image_token_id) == (32064, 32000)
    vision = card.config["vision_config"]
    assert (vision["num_hidden_layers"], vision["hidden_size"]) == (24, 1024)
    assert (vision["image_size"] // vision["patch_size"]) ** 2 == 576


SCRIPT = '{"method":"script","keep":6,"params":{"query_encoder":"llm_embed_mean"}}'


def test_pruned_runs_have_the_same_rows_and_compute_fewer_tokens(
    config_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[list[int]] = []
    real = EngineCore.add

    def add(self: EngineCore, sequence: Any, tokens: Any) -> None:
        entered[-1].append(sum(map(len, tokens)))
        real(self, sequence, tokens)

    monkeypatch.setattr(EngineCore, "add", add)
    runs = []
    for pruning in (None, SCRIPT):
        entered.append([])
        runs.append(run_offline_bench(config_dir, device="cpu", workload=TINY, pruning=pruning))
    names = [[(r["metric"], r["images"], r["batch"]) for r in run] for run in runs]
    assert names[0] == names[1]
    assert runs[1][0]["pruning"] == SCRIPT and SCRIPT in runs[1][0]["command"]
    # of 16 vision tokens per image 6 are left; prompts of one and of two images
    assert set(entered[0]) == {16, 32} and set(entered[1]) == {6, 12}


@pytest.mark.parametrize(
    ("pruning", "named"),
    [
        ("nonsense", "not JSON"),
        ('{"method":"script"}', "keep"),
        ('{"method":"adaptinfer","keep":0.5}', "prefill_bench"),
        ('{"method":"script","keep":6}', "text_tower"),
    ],
)
def test_pruning_that_cannot_be_benchmarked_is_refused(
    config_dir: Path, pruning: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        run_offline_bench(config_dir, device="cpu", workload=TINY, pruning=pruning)


def test_every_measurement_has_its_row(
    config_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "offline.csv"
    rows = run_offline_bench(config_dir, device="cpu", workload=TINY, out=out)
    found = {(r["metric"], r["images"], r["batch"], r["output_tokens"]): r["value"] for r in rows}
    for images in (1, 2):
        parts = ("TTFT: pixels on the host", "TTFT: encode", "TTFT: prefill and first token")
        for metric in ("TTFT", *parts):
            assert found[metric, images, 1, ""] > 0
    for batch in (1, 3):
        assert found["TPOT", 1, batch, 5] > 0
    for output in (2, 4):
        rate = found["requests/s, all present at once", 1, "", output]
        assert found["output tokens/s, the same run", 1, "", output] == pytest.approx(output * rate)
    assert all(r["samples"] == 5 for r in rows if r["metric"] == "TPOT")
    with out.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    assert {row["command"] for row in read} == {
        f"epd bench --offline {config_dir} --random-weights"
    }
    assert all(row["device"] and row["torch"] and row["date"] for row in read)
    assert capsys.readouterr().out.rstrip().endswith("|")


def test_requests_give_all_their_tokens_and_all_their_blocks_back(config_dir: Path) -> None:
    pipeline = OfflinePipeline(
        config_dir, device="cpu", dtype=torch.float32, seed=0,
        sizes=Sizes(text_tokens=8, max_num_seqs=4, longest_output=16),
    )  # fmt: skip
    steps = pipeline.decode_seconds(3, steps=6)
    assert len(steps) == 6
    # more pictures than fit at a time: the rest waits its turn
    assert list(pipeline.burst(pipeline.pictures(11), 3))[-1] == 11
    pipeline.first_token(pipeline.pictures(2), split=True)
    stats = pipeline.core.stats()
    assert (stats.waiting, stats.running) == (0, 0)
    assert stats.blocks_free == stats.blocks_total
    pipeline.core.check()


def test_the_pool_is_sized_for_how_kv_is_held(
    config_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark and the engine count the same bytes per block."""
    counted: list[int] = []
    block_bytes = KVPool.block_bytes

    def counting(*args: Any, **options: Any) -> int:
        counted.append(block_bytes(*args, **options))
        return counted[-1]

    monkeypatch.setattr(KVPool, "block_bytes", staticmethod(counting))
    pipeline = OfflinePipeline(
        config_dir, device="cpu", dtype=torch.float32, seed=0, kv="fp8",
        sizes=Sizes(text_tokens=8, max_num_seqs=2, longest_output=4),
    )  # fmt: skip
    assert pipeline.core.pool.formats == ("fp8", "fp8")
    # 2 layers, K and V, 16 rows, 4 heads, 16 codes and a scale
    assert counted == [2 * 2 * 16 * 4 * (16 + 4)] * 2
    assert len(pipeline.decode_seconds(1, steps=2)) == 2


@pytest.mark.parametrize("scheme", ["w4a8-fp8", "w4a16", "fp8"])
def test_rounded_weights_are_smaller_and_rows_say_so(
    config_dir: Path, scheme: str, tmp_path: Path
) -> None:
    work = Workload(
        image_counts=(), batches=(2,), decode_steps=3, requests=1, outputs=(), text_tokens=8
    )
    out = tmp_path / "rounded.csv"
    rows, plain = (
        run_offline_bench(config_dir, device="cpu", workload=work, out=out, kv="int4",
                          quantize=asked)
        for asked in (scheme, None)
    )  # fmt: skip
    assert [row["batch"] for row in rows] == [2, 2]
    for row in rows:
        assert (row["quantize"], row["kv"], row["cuda_graphs"]) == (scheme, "int4", 0)
        assert row["command"].endswith(f"--quantize {scheme} --kv int4")
    saved = plain[0]["weight_bytes"] - rows[0]["weight_bytes"]
    if scheme != "w4a16":  # the head is in FP8 then
        saved -= 32064 * (64 * (4 - 1) - 4)
    # fp32 layers of 4 * 64 * 64 + 3 * 64 * 96 weights, less codes, scales and padding to 128 inputs
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    assert weights * (4 - 1.2) < saved < weights * (4 - 0.5)


def test_an_unknown_scheme_is_an_error(config_dir: Path) -> None:
    with pytest.raises(ConfigError, match="quantize must be one of w4a16"):
        run_offline_bench(config_dir, device="cpu", workload=TINY, quantize="int3")


def test_it_needs_neither_network_nor_settings() -> None:
    code = (
        "import sys, epd_services.offline_bench, epd_services.offline_pipeline\n"
        f"print([m for m in {ABSENT!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bad_input_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError):
        run_offline_bench(tmp_path / "none", device="cpu", workload=TINY)
    with pytest.raises(ConfigError, match="random"):
        offline_bench.run_from_cli(tmp_path, random_weights=False, out=None, device=None,
                                   dtype=None, seed=0)  # fmt: skip
    assert offline_bench.main([str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_transformers_and_llm_agree_on_a_tiny_checkpoint(tmp_path: Path) -> None:
    model = write_tiny_llava(tmp_path / "tiny", seed=3)
    colors = ("red", "green", "blue")
    pictures = [Picture.of(f"What is it? {c}", Image.new("RGB", (40, 30), c)) for c in colors]
    seen: list[int] = []
    expected = expected_answers(pictures, 6, lambda done, note: seen.append(done), model=model)
    assert len(set(expected)) == 3
    assert seen[-1] == 3
    order = [2, 0, 1, 0]
    outcomes, seconds = generate_sequentially(
        pictures, order, expected, 6, lambda done, note: None, limit=60.0, model=model
    )
    assert [outcome.right for outcome in outcomes] == [True] * 4
    assert [outcome.reply.text for outcome in outcomes] == [expected[i] for i in order]
    assert all(o.reply.usage == {"completion_tokens": 6} for o in outcomes)
    assert all(o.reply.ttft and o.reply.tpot and o.reply.ttft < o.reply.total for o in outcomes)
    assert seconds > 0
    few, _ = generate_sequentially(
        pictures, order, expected, 6, lambda done, note: None, limit=0.0, model=model
    )
    assert len(few) == 1
