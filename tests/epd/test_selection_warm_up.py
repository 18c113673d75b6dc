"""What choosing vision tokens runs before the first request: every variant of every kernel that a
request may need, whatever its method, sizes and question.
"""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from epd.engine import LLM
from epd.models.tiny import write_tiny_llava
from epd.selection_warm_up import Run, choice_runs, encoder_runs, run_all
from epd_kernels import launch
from epd_pruning import available
from epd_pruning.dart import Dart

from .selection_traffic import Halves

SIDE = 18  # 324 tokens: pools of up to 128, 256 and 512
OPS = {
    "cosines": ("cosines", "_cosine_kernel"),
    "graph_score": ("graph_score", "_norm_kernel", "_graph_kernel", "_threshold_kernel",
                    "_score_kernel"),
    "greedy_dpp": ("greedy_dpp", "_greedy_dpp_kernel"),
    "relevance": ("relevance", "_cosine_to_query_kernel", "_shape_kernel"),
    "row_sort": ("sort_rows", "_sort_kernel"),
}  # fmt: skip


@dataclass
class Launches:
    """Notes what Triton would compile a launch for, and launches nothing."""

    seen: set[tuple[Any, ...]] = field(default_factory=set)

    def of(self, name: str, kernel: Any) -> Any:
        """Something to launch in place of `kernel`."""
        parameters = inspect.signature(getattr(kernel, "fn", kernel)).parameters

        def note(*args: Any, **fixed: Any) -> None:
            given = dict(zip(parameters, args, strict=False))
            kinds = tuple(_kind(which, value) for which, value in given.items())
            self.seen.add((name, *kinds, *sorted(fixed.items())))

        return _Launchable(note)

    def programs(self) -> set[int]:
        """Tokens that programs of the greedy choice have room for."""
        return {dict(key[-3:])["BLOCK_N"] for key in self.seen if key[0] == "_greedy_dpp_kernel"}


@dataclass
class _Launchable:
    launch: Callable[..., None]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch


def _kind(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and name not in launch._VARYING:
        return value == 1, value % 16 == 0
    return type(value)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Every op of the choice is computed by its reference, and would be by its kernels."""
    launches = Launches()
    for module_name, (op, *kernels) in OPS.items():
        module = importlib.import_module(f"epd_kernels.{module_name}")
        for name in kernels:
            monkeypatch.setattr(module, name, launches.of(name, getattr(module, name)))
        monkeypatch.setattr(module, f"{op}_ref", _both(module, op))
    return launches


def _both(module: Any, op: str) -> Callable[..., Any]:
    reference, fused = getattr(module, f"{op}_ref"), getattr(module, f"{op}_triton")

    def run(*args: Any, **options: Any) -> Any:
        found, expected = fused(*args, **options), reference(*args, **options)
        if isinstance(found, torch.Tensor):
            return found.copy_(expected)  # laid out as the kernels lay it out
        return tuple(one.copy_(other) for one, other in zip(found, expected, strict=True))

    return run


@pytest.fixture(scope="module", params=[True, False], ids=["tower", "no-tower"])
def halves(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Halves:
    path = tmp_path_factory.mktemp("model")
    return Halves.write(path, SIDE, "cpu", torch.float32, tower=request.param)


def _runs(halves: Halves) -> list[Run]:
    choice = choice_runs(halves.queries, halves.decoder, halves.num_tokens)
    return encoder_runs(halves.encoder, 3) + choice


def test_no_request_needs_a_kernel_that_was_not_run(halves: Halves, launches: Launches) -> None:
    runs = _runs(halves)
    with capture_logs() as logs:
        run_all("here", runs)
    assert [log["log_level"] for log in logs] == ["info"]
    assert logs[0]["runs"] == len(runs)
    assert launches.programs() == {128, 256, 512}
    warm, source = set(launches.seen), random.Random(3)
    launches.seen.clear()
    served = [method for _ in range(60) for method in halves.serve(source)]
    assert set(served) >= set(available("token"))
    assert launches.seen - warm == set()
    assert len(warm) <= 20


def test_each_method_that_can_be_served_is_run_on_both_sides(halves: Halves) -> None:
    tower = halves.queries.tower is not None
    encoder = [run.method for run in encoder_runs(halves.encoder, 3)]
    assert encoder[:3] == ["vision tower"] * 3
    assert set(encoder[3:]) == set(available("token"))
    choice = [run.method for run in choice_runs(halves.queries, halves.decoder, 324)]
    assert set(choice) == {"cdpruner", "relevance", "script"}
    # three questions, each to the text tower and as embeddings; three more pools of script
    assert choice.count("cdpruner") == (6 if tower else 3)
    assert choice.count("script") == choice.count("cdpruner") * (5 + 3)


def test_what_fails_is_told_and_stops_nothing(
    halves: Halves, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dart, "rank_image", lambda *_: 1 / 0)
    runs = encoder_runs(halves.encoder, 1)
    with capture_logs() as logs:
        run_all("encode", runs)
    failed, done = logs
    assert (failed["log_level"], failed["method"], failed["error"]) == (
        "error", "dart", "ZeroDivisionError"
    )  # fmt: skip
    assert (done["log_level"], done["runs"]) == ("info", len(runs))


def test_it_ends_at_its_limit() -> None:
    ticks = iter(range(100))
    called: list[str] = []
    runs = [Run(name, partial(called.append, name)) for name in "abcdef"]
    with capture_logs() as logs:
        run_all("encode", runs, limit=2.5, clock=lambda: float(next(ticks)))
    assert called == ["a", "b"]
    assert logs[0]["methods"] == ["c", "d", "e", "f"]
    assert logs[1]["runs"] == 2


def test_nothing_is_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("epd.selection_warm_up.run_all", lambda *_: pytest.fail("a CPU compiles"))
    LLM(write_tiny_llava(tmp_path / "m"))
