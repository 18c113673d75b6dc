"""What `epd eval` reads and writes: benchmarks in a directory, journals, pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from epd.errors import ConfigError
from epd_services.evaluation.journal import Cell, Journal, RunFacts, Tokens
from epd_services.evaluation.plot import check_plotting, write_plot
from epd_services.evaluation.questions import load_bench

FACTS = RunFacts(
    model="m", revision="r", bench="b", bench_digest="d", questions=4, seed=1, device="cpu",
    dtype="float32", batch=2, max_tokens=8,
)  # fmt: skip


def make_bench(directory: Path, *lines: Any) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4), "red").save(directory / name)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (directory / "questions.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return directory


def question(**changes: Any) -> dict[str, Any]:
    return {"images": ["a.png"], "question": "Which?", "answer": "red", **changes}


def test_directory_gives_questions_in_order(tmp_path: Path) -> None:
    make_bench(tmp_path, question(type="colour"), "", question(images=["b.png", "a.png"]))
    bench = load_bench(str(tmp_path), questions=10, seed=0)
    assert [q.type for q in bench.questions] == ["colour", "all"]
    assert bench.questions[1].images == (tmp_path / "b.png", tmp_path / "a.png")
    assert len(load_bench(str(tmp_path), questions=1, seed=0).questions) == 1
    make_bench(tmp_path, question(answer="blue"))
    assert load_bench(str(tmp_path), questions=10, seed=0).digest != bench.digest


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1"),
        (question(answer=3), "answer"),
        (question(more=1), "more"),
        (question(images=[]), "needs a question and 1 to 16 images"),
        (question(question=" "), "needs a question"),
        (question(images=["c.png"]), "'c.png' is no file"),
        (question(images=["../a.png"]), "is no file in the directory"),
    ],
    ids=["json", "type", "field", "images", "question", "absent", "outside"],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: Any, told: str) -> None:
    inner = tmp_path / "bench"
    inner.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=told):
        load_bench(str(make_bench(inner, line)), questions=9, seed=0)


def test_a_directory_without_questions_is_refused(tmp_path: Path) -> None:
    for name, told in (("nowhere", "neither"), (str(tmp_path), "questions.jsonl")):
        with pytest.raises(ConfigError, match=told):
            load_bench(name, questions=1, seed=0)
    make_bench(tmp_path)
    with pytest.raises(ConfigError, match="has no questions"):
        load_bench(str(tmp_path), questions=1, seed=0)


def cell(method: str, **changes: Any) -> Cell:
    tokens = Tokens(full=8, actual=4, processed=[4, 2], booked=[2, 2])
    made = Cell(
        method=method, budget=0.5, fingerprint="f", right="0110", seconds={"decode": 0.5},
        tokens=tokens, decoder_macs=1.0, selector_macs=0.0, kv_bytes=2.0,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def test_journal_gives_back_what_was_finished(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "journal.jsonl"
    Journal(FACTS, path).add(cell("script"))
    again = Journal(FACTS, path)
    assert again.get("script", 0.5, "f") == cell("script")
    assert again.get("script", 0.25, "f") is None
    assert again.get("random", 0.5, "f") is None
    with pytest.raises(ConfigError, match="other hyper-parameters"):
        again.get("script", 0.5, "other")


def test_journal_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(FACTS, path).add(cell("script"))
    with path.open("ab") as file:
        file.write(b'{"method":"rand')
    again = Journal(FACTS, path)
    again.add(cell("dpp"))
    last = Journal(FACTS, path)
    assert last.get("script", 0.5, "f") == cell("script")
    assert last.get("dpp", 0.5, "f") == cell("dpp")


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"questions": 5}, {"revision": "x"}, {"bench_digest": "x"}, {"dtype": "x"}],
    ids=lambda change: next(iter(change)),
)
def test_journal_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(FACTS, path).add(cell("script"))
    with pytest.raises(ConfigError, match=f"made with {next(iter(change))}"):
        Journal(msgspec.structs.replace(FACTS, **change), path)


def test_any_other_file_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text("hello\n")
    with pytest.raises(ConfigError, match="no journal"):
        Journal(FACTS, path)
    assert path.read_text() == "hello\n"


def row(method: str, budget: float, relative: float) -> dict[str, Any]:
    return {"method": method, "budget": budget, "note": "", "processed_share": budget,
            "relative": relative, "relative_low": relative, "relative_high": relative}  # fmt: skip


def test_plot_is_a_picture_of_the_measured_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    absent = {"method": "fastv", "budget": 0.1, "note": "out of reach", "gate": ""}
    made = [row("none", 1.0, 1.0), row("script", 0.25, 0.99), row("random", 0.25, 0.5), absent]
    path = tmp_path / "plots" / "scenes.png"
    write_plot(path, made, "title")
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    assert pixels.width > 600
    assert len(pixels.getcolors(1 << 24) or ()) > 20


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    monkeypatch.setattr("epd_services.evaluation.plot.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"epd\[plot\]"):
        check_plotting()
