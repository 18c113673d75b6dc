"""The demonstration around the stack: pictures, scoring, tables, report."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from epd_services import demo
from epd_services.client import Reply
from epd_services.demo import Question, Result, ask_all, draw_questions, passed, write_report


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("COLUMNS", "160")


def result(*, right: bool, kind: str = "exist") -> Result:
    return Result(type=kind, question="Is there a star?", answer="yes" if right else "no",
                  expected="yes", right=right, files=["a.png"],
                  timings={"encode": 0.0123, "ttft": 0.05, "total": 0.06})  # fmt: skip


def test_pictures_are_left_where_it_says(tmp_path: Path) -> None:
    questions = draw_questions(3, 5, out=tmp_path / "out", multi=True)
    assert [question.type for question in questions][1] == "which_image"
    assert len(questions[1].files) > 1
    for question in questions:
        for file in question.files:
            with Image.open(file) as image:
                assert image.format == "PNG"
                assert min(image.size) >= 100
    again = draw_questions(3, 5, out=tmp_path / "again", multi=True)
    for one, other in zip(questions, again, strict=True):
        assert (one.text, one.expected) == (other.text, other.expected)
        for a, b in zip(one.files, other.files, strict=True):
            assert a.read_bytes() == b.read_bytes()


class FakeClient:
    """Answers with the file's content; counts how many ask at a time."""

    def __init__(self) -> None:
        self.inside = self.most = 0

    async def ask(self, question: str, images: list[bytes], **options: Any) -> Reply:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(0.01)
        self.inside -= 1
        if question == "broken":
            return Reply(status=503, error="no worker", code="unavailable")
        text = f" {images[0].decode()} "
        return Reply(status=200, text=text, finish_reason="stop", timings={"encode": 0.5}, total=1)


def test_answers_are_scored_exactly(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"red")
    asked = [Question("t", text, answer, (file,))
             for text, answer in [("a", "red"), ("b", "Red"), ("broken", "red")] * 4]  # fmt: skip
    client = FakeClient()
    results = asyncio.run(ask_all(client, asked, 3))
    assert [r.right for r in results] == [True, False, False] * 4
    assert results[2].answer == "[no worker]"
    assert results[0].timings == {"encode": 0.5, "total": 1}
    assert client.most == 3


@pytest.mark.parametrize(
    ("right", "count", "expected"),
    [(7, 8, True), (6, 8, False), (8, 8, True), (35, 40, True), (34, 40, False), (1, 1, True)],
)
def test_seven_of_eight_pass(right: int, count: int, expected: bool) -> None:
    results = [result(right=number < right) for number in range(count)]
    assert passed(results) is expected


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    demo._show_each([result(right=True), result(right=False)], "1E1P1D")
    shown = capsys.readouterr().out
    assert "1E1P1D, times in milliseconds" in shown
    assert [line.split()[-6] for line in shown.splitlines() if "star" in line] == ["yes", "NO"]
    assert next(line.split()[-5:] for line in shown.splitlines() if "star" in line) == [
        "12", "-", "-", "50", "60"
    ]  # fmt: skip
    demo._show_types([result(right=True), result(right=False), result(right=True, kind="text")])
    captured = capsys.readouterr()
    assert ["exist", "2", "1", "50.0%"] in [line.split() for line in captured.out.splitlines()]
    assert "a.png" in captured.err


def test_the_report_is_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_report(path, [result(right=True), result(right=False)], topology="1EPD")
    report = json.loads(path.read_text())
    assert (report["topology"], report["right"], report["accuracy"]) == ("1EPD", 1, 0.5)
    assert report["types"] == {"exist": {"asked": 2, "right": 1}}
    assert report["answers"][0]["timings"]["encode"] == 0.0123
