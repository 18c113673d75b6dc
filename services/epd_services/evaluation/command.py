"""`epd eval`: every method at every budget on the same questions, beside the dense run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from epd.errors import ConfigError
from epd_services.bench_rows import machine, write_csv
from epd_services.cli.terminal import note, print_json
from epd_services.evaluation.journal import Cell, Journal
from epd_services.evaluation.laboratory import Laboratory, OutOfReach
from epd_services.evaluation.methods import DENSE, Method, parse_budgets, parse_methods
from epd_services.evaluation.plot import check_plotting, write_plot
from epd_services.evaluation.questions import load_bench
from epd_services.evaluation.table import Result, rows, show, unfit
from epd_services.progress import Advance, progress

if TYPE_CHECKING:
    import torch

__all__ = ["Evaluation", "evaluate", "run_table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is asked of `epd eval`."""

    model: str | None = None
    bench: str = "scenes"
    methods: str = "all"
    budgets: str = "0.25,0.11,0.056"
    questions: int = 1020
    seed: int = 1
    device: str = "auto"
    dtype: str = "auto"
    batch: int | None = None
    max_tokens: int = 64
    csv: Path | None = None
    plot: Path | None = None
    resume: Path | None = None
    as_json: bool = False

    @property
    def command(self) -> str:
        """The command line that makes the same table again."""
        parts = ["epd eval", *([self.model] if self.model else []), f"--bench {self.bench}",
                 f"--methods '{self.methods}'", f"--budgets {self.budgets}",
                 f"--questions {self.questions}", f"--seed {self.seed}"]  # fmt: skip
        for name in ("device", "dtype"):
            if getattr(self, name) != "auto":
                parts.append(f"--{name} {getattr(self, name)}")
        if self.batch is not None:
            parts.append(f"--batch {self.batch}")
        return " ".join(parts)


def evaluate(asked: Evaluation) -> int:
    """Make the table, print it and write what was asked for; the exit code. Raises `EPDError`."""
    import torch

    torch.set_grad_enabled(False)
    methods, budgets = parse_methods(asked.methods), parse_budgets(asked.budgets)
    if asked.plot is not None:
        check_plotting()
    device = _device(asked.device)
    bench = load_bench(asked.bench, questions=asked.questions, seed=asked.seed)
    laboratory = Laboratory(
        bench, methods, model=asked.model, device=device, dtype=_dtype(asked.dtype, device),
        batch=asked.batch or (128 if device.startswith("cuda") else 32),
        max_tokens=asked.max_tokens,
    )  # fmt: skip
    facts = laboratory.facts(asked.seed)
    result = run_table(laboratory, methods, budgets, Journal(facts, asked.resume), asked.seed)
    made = rows(result)
    whence = machine(command=asked.command, device=device)
    told = {"model": facts.model, "revision": facts.revision[:16], "bench": facts.bench,
            "questions": facts.questions, "seed": facts.seed, "dtype": facts.dtype,
            "batch": facts.batch}  # fmt: skip
    if asked.csv is not None:
        write_csv(asked.csv, [*({**row, **told, **whence} for row in made)])
    title = f"{facts.model}, {facts.bench}, {facts.questions} questions, seed {facts.seed}"
    if asked.plot is not None:
        write_plot(asked.plot, made, title)
    if asked.as_json:
        print_json({**whence, **told, "unfit": unfit(made), "rows": made})
    else:
        show(made, title)
    return 0


def run_table(
    laboratory: Laboratory,
    methods: Sequence[Method],
    budgets: Sequence[float],
    journal: Journal,
    seed: int,
) -> Result:
    """The dense cell and every method at every budget; those in the journal are not repeated."""
    count = len(laboratory.bench.questions)
    plan: list[tuple[Method | None, float]] = [(None, 1.0)]
    plan += [(method, budget) for budget in budgets for method in methods]
    cells: list[Cell] = []
    missing: dict[tuple[str, float], str] = {}
    with progress("eval", (len(plan) + 1) * count) as advance:
        laboratory.on_encoded = lambda done: advance(done, "encoding images")
        for index, (method, budget) in enumerate(plan, 1):
            name = DENSE if method is None else method.name
            mark = DENSE if method is None else laboratory.fingerprint(method)
            cell = journal.get(name, budget, mark)
            try:
                if cell is None:
                    cell = laboratory.measure(
                        method, budget, _from(advance, index, count, name, budget)
                    )
                    journal.add(cell)
                cells.append(cell)
            except OutOfReach as error:
                missing[name, budget] = str(error)
        advance((len(plan) + 1) * count, "done")
    for (name, budget), why in missing.items():
        note(f"{name} at {budget:g}: {why}")
    return Result(cells[0], cells[1:], missing, [q.type for q in laboratory.bench.questions], seed)


def _from(advance: Advance, index: int, count: int, name: str, budget: float) -> _Step:
    return _Step(advance, index * count, f"{name} {budget:g}")


@dataclass(frozen=True, slots=True)
class _Step:
    """Progress within one cell."""

    advance: Advance
    begin: int
    label: str

    def __call__(self, done: int) -> None:
        self.advance(self.begin + done, self.label)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name} was asked for, but this machine has no usable GPU")
    return name


def _dtype(name: str, device: str) -> torch.dtype:
    from epd.tensors import torch_dtype

    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    return torch_dtype(name)
