"""Pruning and quantisation together: which tokens are kept, and what is answered.

python -m epd.quantize.pruning_study --questions 170 -o docs/eval/quantize_pruning.csv

`jaccard` is the mean overlap of the vision tokens kept with those the plain model keeps under the
same method: |A and B| / |A or B|. Methods before the LLM see neither quantised weights nor coded
keys, so theirs is 1 unless something is wrong; those inside read the decoder's own attention.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epd.config import EngineConfig
from epd.core import EngineCore
from epd.demo import CHECKPOINT
from epd.demo.examples import Example, held_out
from epd.engine import LLM
from epd.models.registry import load_decoder
from epd.quantize.options import QuantizeOptions
from epd.quantize.run import calibration_samples, quantize_model
from epd.quantize.study import RememberedVision, ask

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from epd.step import NewSequence
    from epd_pruning.layer_base import LayerBatch, LayerPruner

__all__ = ["Recorder", "main", "mean_jaccard"]

_COLUMNS = ("model", "kv", "method", "budget", "questions", "correct", "accuracy", "dense_accuracy",
            "plain_accuracy", "jaccard", "seed")  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Method:
    """A pruning spec, and the method inside the decoder that a core must be built with."""

    spec: dict[str, Any] | None
    inside: str | None = None


_METHODS = {
    "none": _Method(None),
    "dpp": _Method({"method": "dpp", "keep": 0.25}),
    "script": _Method({"method": "script", "keep": 0.25}),
    "adaptinfer[2]": _Method({"method": "adaptinfer", "keep": 0.5}, "adaptinfer:2"),
    "fastv[2]": _Method({"method": "fastv", "keep": 0.5}, "fastv:2"),
    "dpp+adaptinfer[2]": _Method(
        {"method": "dpp+adaptinfer", "keep": 0.3, "layer_keep": 0.25}, "adaptinfer:2"
    ),
}
_MODELS = {
    "plain": None,
    "fireq": QuantizeOptions(scheme="fireq", kv="int4", head="bf16"),
    "qqq": QuantizeOptions(scheme="qqq", kv="int4", head="bf16"),
    "fireq nearest": QuantizeOptions(scheme="fireq", kv="int4", head="bf16", nearest=True),
}


class Recorder:
    """A core, or a pruner inside a decoder, that writes down which tokens of each prompt stay."""

    def __init__(self, watched: EngineCore | LayerPruner) -> None:
        self._watched = watched
        self.kept: list[frozenset[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watched, name)

    def add(self, sequence: NewSequence, vision: Sequence[torch.Tensor]) -> None:
        """As the core's own."""
        if any(sequence.kept):
            places = [(i, p) for i, k in enumerate(sequence.kept) if k for p in k.keep_indices]
            self.kept.append(frozenset(image << 32 | place for image, place in places))
        self._watched.add(sequence, vision)  # type: ignore[union-attr]

    def keep_rows(self, batch: LayerBatch, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As the pruner's own; prompts come in the order of their questions."""
        rows, is_vision = self._watched.keep_rows(batch, num_rows)  # type: ignore[union-attr]
        for span, count in zip(batch.spans.spans, batch.num_vision, strict=True):
            if span.votes and span.keep < count:
                inside = rows[(rows >= span.start) & (rows < span.stop) & is_vision]
                number = batch.is_vision[span.start : span.stop].cumsum(0) - 1
                self.kept.append(frozenset(number[inside - span.start].tolist()))
        return rows, is_vision


def mean_jaccard(one: list[frozenset[int]], other: list[frozenset[int]]) -> float | None:
    """The mean overlap of two lists of sets, none of them empty; None of no sets."""
    assert len(one) == len(other)
    shares = [len(a & b) / len(a | b) for a, b in zip(one, other, strict=True)]
    return sum(shares) / len(shares) if shares else None


def main() -> None:
    """Write the table; rows appear as they are measured."""
    parser = argparse.ArgumentParser(prog="python -m epd.quantize.pruning_study")
    parser.add_argument("--questions", type=int, default=170)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/eval/quantize_pruning.csv"))
    given = parser.parse_args()
    examples = held_out(given.questions, given.seed)
    samples = calibration_samples("scenes", given.samples)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", newline="") as file, tempfile.TemporaryDirectory() as directory:
        table = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        table.writeheader()
        vision = RememberedVision(LLM(CHECKPOINT, device=given.device).vision)
        plain: dict[str, tuple[list[frozenset[int]], int]] = {}
        for model, options in _MODELS.items():
            path = CHECKPOINT
            if options is not None:
                path = Path(directory) / model.replace(" ", "-")
                quantize_model(CHECKPOINT, path, options, samples=samples)
            dense = 0
            for name, method in _METHODS.items():
                kept, correct = _measure(path, method, examples, vision, given.device)
                dense = correct if method.spec is None else dense
                reference = plain.setdefault(name, (kept, correct))
                overlap = mean_jaccard(kept, reference[0])
                row = {
                    "model": model, "kv": options.kv if options else "bf16", "method": name,
                    "budget": _budget(method), "questions": len(examples), "seed": given.seed,
                    "correct": correct, "accuracy": round(correct / len(examples), 4),
                    "dense_accuracy": round(dense / len(examples), 4),
                    "plain_accuracy": round(reference[1] / len(examples), 4),
                    "jaccard": None if overlap is None else round(overlap, 4),
                }  # fmt: skip
                table.writerow(row)
                file.flush()
                print(json.dumps(row), flush=True)


def _budget(method: _Method) -> float | None:
    return (method.spec or {}).get("layer_keep", (method.spec or {}).get("keep"))


def _measure(
    path: Path, method: _Method, examples: list[Example], vision: RememberedVision, device: str
) -> tuple[list[frozenset[int]], int]:
    """The tokens kept of each prompt by the last pruner it meets, and the exact answers."""
    config = EngineConfig(layer_pruning=method.inside, prefix_cache=False)
    llm: Any = LLM(path, device=device, config=config)
    recorder = Recorder(llm.core)
    if method.inside is None:
        llm.core = recorder
    else:
        recorder = Recorder(llm.core.layer_pruner)
        decoder = load_decoder(llm.card, device=device)
        llm.core = EngineCore(
            decoder, llm.card, config=config, device=device,
            layer_pruner=recorder,  # type: ignore[arg-type]
        )  # fmt: skip
    answers = ask(llm, examples, vision, method.spec)
    return recorder.kept, sum(
        text == example.answer for text, example in zip(answers.texts, examples, strict=True)
    )


if __name__ == "__main__":
    main()
