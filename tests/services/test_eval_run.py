"""The harness on a tiny model and on the built-in one: the engine's answers, honestly counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from epd import LLM, SamplingParams
from epd.models.tiny import write_tiny_llava, write_tiny_text_tower
from epd.sequence import expand_images
from epd_pruning.schedule import Schedule
from epd_services.evaluation.attention_dump import text_to_vision
from epd_services.evaluation.calibrate import find_schedule
from epd_services.evaluation.command import Evaluation, evaluate, run_table
from epd_services.evaluation.journal import Journal
from epd_services.evaluation.laboratory import Laboratory
from epd_services.evaluation.methods import parse_methods
from epd_services.evaluation.questions import load_bench

METHODS = "random,script,low_resolution,fastv[layers=0],dpp+adaptinfer[layers=[0,2]]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_llava(tmp_path_factory.mktemp("model"), num_layers=4, seed=3)
    write_tiny_text_tower(directory)
    return directory


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Five questions over three pictures; the dense model's own answers are right but for one."""
    directory = tmp_path_factory.mktemp("bench")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 30, 3), np.uint8)
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(directory / f"{index}.png")
    asked = [
        ([0], "Which?"),
        ([1], "Where is it now?"),
        ([2, 0], "Both?"),
        ([2], "text"),
        ([1], "?"),
    ]
    images = [[directory / f"{i}.png" for i in places] for places, _ in asked]
    answers = LLM(model).chat(
        [text for _, text in asked], images=images, sampling=SamplingParams(max_tokens=6)
    )
    lines = [
        {"images": [f"{i}.png" for i in places], "question": text,
         "answer": answer.text if index else "something else", "type": "text" if index > 2 else "x"}
        for index, ((places, text), answer) in enumerate(zip(asked, answers, strict=True))
    ]  # fmt: skip
    (directory / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return directory


def laboratory(model: Path, bench: Path, methods: str, batch: int = 2) -> Laboratory:
    found = load_bench(str(bench), questions=9, seed=0)
    return Laboratory(found, parse_methods(methods), model=model, batch=batch, max_tokens=6)


def test_dense_answers_are_the_engines(model: Path, bench: Path) -> None:
    for batch in (2, 8):
        cell = laboratory(model, bench, "random", batch).measure(None, 1.0, lambda done: None)
        assert cell.right == "01111"
        assert cell.tokens.actual == cell.tokens.full == 16 * 6 / 5


def test_every_kind_of_method_gives_its_cell_and_a_journal_spares_it(
    model: Path, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, methods = laboratory(model, bench, METHODS), parse_methods(METHODS)
    path = tmp_path / "journal.jsonl"
    result = run_table(lab, methods, [0.5, 0.2], Journal(lab.facts(0), path), 0)
    made = {(cell.method, cell.budget): cell for cell in result.cells}
    # a tiny decoder of four layers cannot process a fifth when its first layer sees everything
    assert list(result.missing) == [("fastv[layers=0]", 0.2)]
    assert made["random", 0.2].tokens.processed == [3 * 6 / 5] * 4
    assert made["fastv[layers=0]", 0.5].tokens.processed_average <= 8 * 6 / 5
    assert made["dpp+adaptinfer[layers=[0,2]]", 0.2].tokens.actual == 6 * 6 / 5
    assert all(cell.selector_macs > 0 for name, cell in made.items() if "script" in name[0])
    assert all(
        set(c.seconds) == {"encoder", "selector", "prefill", "decode"} for c in made.values()
    )

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished cell was measured again")

    monkeypatch.setattr(Laboratory, "measure", never)
    again = run_table(lab, methods[:2], [0.2], Journal(lab.facts(0), path), 0)
    assert again.cells == [made["random", 0.2], made["script", 0.2]]


def test_counts_are_those_of_the_kv_that_the_core_stores(model: Path, bench: Path) -> None:
    """The harness counts by closed form; the core's own sequences know what they dropped."""
    (method,) = parse_methods("dpp+adaptinfer[layers=[0,2]]")
    lab = laboratory(model, bench, method.name, batch=1)
    cell = lab.measure(method, 0.5, lambda done: None)
    engine = lab._engine
    core = engine._core(lab._pruners[method.name].layer)
    stored = np.zeros(4)
    for number in range(5):
        images = engine._select(number, method, 0.5, lab._pruners[method.name].token)
        sequence = engine._sequence(number, images, method, 0.5)
        core.add(sequence, [image.tokens for image in images])
        held = core._scheduler.sequences[str(number)]
        while not (step := core.step()).prefilled:
            assert not step.failed
        lengths = held.table.lengths if held.table else None
        assert lengths is not None
        text = len(engine.prompts[number]) - len(images)
        stored += [lengths[group] - text for group in core.facts.layer_group]
        core.cancel(str(number))
    assert cell.tokens.processed == pytest.approx((stored / 5).tolist())


def test_command_writes_table_csv_plot_and_json(
    model: Path, bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Evaluation(
        model=str(model), bench=str(bench), methods="random,script", budgets="0.5", questions=5,
        csv=tmp_path / "t.csv", plot=tmp_path / "t.png", resume=tmp_path / "j.jsonl", batch=4,
        device="cpu", max_tokens=6,
    )  # fmt: skip
    pytest.importorskip("matplotlib")
    assert evaluate(asked) == 0
    assert "script" in capsys.readouterr().out
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert len(lines) == 4
    assert all(f"--bench {bench} --methods 'random,script'" in line for line in lines[1:])
    assert (tmp_path / "t.png").stat().st_size > 1000
    again = Evaluation(
        model=str(model), bench=str(bench), methods="random,script", budgets="0.5", questions=5,
        resume=tmp_path / "j.jsonl", batch=4, device="cpu", max_tokens=6, as_json=True,
    )  # fmt: skip
    assert evaluate(again) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in told["rows"]] == ["none", "random", "script"]
    assert told["rows"][0]["exact"] == pytest.approx(4 / 5)


def test_attention_dump_is_the_softmax_of_an_eager_forward(model: Path, bench: Path) -> None:
    transformers = pytest.importorskip("transformers")
    lab = laboratory(model, bench, "random")
    reference = transformers.LlavaForConditionalGeneration.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    (image,) = lab._encoded.of(1)
    engine = lab._engine
    ids, spans = expand_images(engine.prompts[1], lab.card.image_token_id, ["k"], [16])
    found = text_to_vision(lab._decoder, ids, spans, [image.embeddings])
    embeds = reference.get_input_embeddings()(torch.tensor(ids).clamp(0, 300))
    embeds[spans[0].start : spans[0].stop] = image.embeddings
    maps = reference.model.language_model(
        inputs_embeds=embeds[None], output_attentions=True
    ).attentions
    for layer, attention in enumerate(maps):
        wanted = attention[0, :, spans[0].stop :, spans[0].start : spans[0].stop].sum((0, 1))
        torch.testing.assert_close(found[layer], wanted, rtol=1e-4, atol=1e-5)


def test_calibration_fits_the_decoder(model: Path) -> None:
    found = find_schedule(str(model), samples=4, seed=7, average=0.5)
    assert len(found.histogram) == 4
    found.schedule.check(4)
    assert Schedule.from_json(found.schedule.to_json()) == found.schedule
    average = sum(found.schedule.lengths(found.num_tokens, 4)) / 4
    assert average <= 0.5 * found.num_tokens
