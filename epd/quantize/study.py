"""What quantisation costs the built-in model: exact answers on held-out questions, per scheme.

python -m epd.quantize.study --questions 170 --samples 32 -o docs/eval/quantize.csv

Only the layers are quantised, unless a row says otherwise of KV, head or vision side.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epd.cache.keys import pixel_digest
from epd.config import EngineConfig
from epd.demo import CHECKPOINT
from epd.demo.examples import Example, held_out
from epd.engine import LLM, Completion
from epd.images import rgb_array
from epd.kv.formats import KV_CODED, KV_PLAIN
from epd.models.registry import load_decoder
from epd.quantize.options import QuantizeOptions
from epd.quantize.run import calibration_samples, quantize_model
from epd.request import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from epd.images import RGBArray
    from epd.models.vision import VisionEncoder
    from epd_pruning.base import VisionInputs

__all__ = ["Answers", "Measured", "RememberedVision", "ask", "compare", "main"]

_MAX_TOKENS = 48
_LAYERS = tuple(
    QuantizeOptions(head="bf16", **given)
    for given in (
        {"scheme": "w4a16", "nearest": True},
        {"scheme": "w4a16"},
        {"scheme": "qqq", "nearest": True},
        {"scheme": "qqq"},
        {"scheme": "qqq", "rotate": True},
        {"scheme": "qqq", "group_size": 0, "nearest": True},
        {"scheme": "qqq", "group_size": 0},
        {"scheme": "fireq", "nearest": True},
        {"scheme": "fireq"},
        {"scheme": "fp8"},
    )
)
_KV = tuple(
    QuantizeOptions(head="bf16", kv="int4", **given)
    for given in (
        {"scheme": "qqq", "nearest": True},
        {"scheme": "qqq"},
        {"scheme": "fireq", "nearest": True},
        {"scheme": "fireq"},
        {"scheme": "fireq", "rotate": True},
    )
)
_CASES = {
    "layers": _LAYERS,
    "kv": _KV,
    "head": (QuantizeOptions(scheme="fireq", head="fp8"),),
    "vision": (QuantizeOptions(scheme="fireq", head="fp8", vision=True),),
}
_COLUMNS = ("scheme", "kv", "kv_fallbacks", "head", "vision", "group_size", "method", "samples",
            "questions", "correct", "accuracy", "same_tokens", "layer_output_error",
            "vision_token_error", "decoder_bytes", "seed")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answers:
    """Token ids and texts of greedy answers, and the bytes of the decoder that gave them.

    `fallbacks` counts the layers that did not bear the KV format asked for.
    """

    token_ids: list[list[int]]
    texts: list[str]
    decoder_bytes: int
    fallbacks: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """Exact answers, and the share of greedy tokens equal, position by position, to a reference."""

    correct: int
    same_tokens: float


class RememberedVision:
    """A vision encoder that encodes each picture once for the same needs, whatever decoder asks."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self._encoder = encoder
        self._known: dict[tuple[str, frozenset[str]], VisionInputs] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode_inputs(
        self, images: Sequence[RGBArray], needs: frozenset[str] = frozenset()
    ) -> list[VisionInputs]:
        """As the encoder's own."""
        keys = [
            (pixel_digest(image.shape[1], image.shape[0], image.data), needs) for image in images
        ]
        missing = {k: i for k, i in zip(keys, images, strict=True) if k not in self._known}
        inputs = self._encoder.encode_inputs(list(missing.values()), needs)
        self._known.update(zip(missing, inputs, strict=True))
        return [self._known[key] for key in keys]


def ask(
    llm: LLM, examples: list[Example], vision: Any = None, pruning: dict[str, Any] | None = None
) -> Answers:
    """Greedy answers of a model; `vision` replaces its own encoder."""
    if vision is not None:
        llm.vision = vision
    completions: list[Completion] = llm.chat(
        [example.question for example in examples],
        images=[[rgb_array(image) for image in example.images] for example in examples],
        sampling=SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS), pruning=pruning,
    )  # fmt: skip
    return Answers(
        [c.token_ids for c in completions], [c.text.strip() for c in completions],
        load_decoder(llm.card).resident_bytes(), llm.core.stats().kv_fallbacks,
    )  # fmt: skip


def compare(answers: Answers, reference: Answers, examples: list[Example]) -> Measured:
    """How `answers` do, beside those of the plain checkpoint."""
    correct = sum(t == e.answer for t, e in zip(answers.texts, examples, strict=True))
    same = total = 0
    for mine, theirs in zip(answers.token_ids, reference.token_ids, strict=True):
        same += sum(a == b for a, b in zip(mine, theirs, strict=False))
        total += max(len(mine), len(theirs))
    return Measured(correct, same / total)


def main() -> None:
    """Write the table; rows appear as they are measured."""
    parser = argparse.ArgumentParser(prog="python -m epd.quantize.study")
    parser.add_argument("--questions", type=int, default=170)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(_CASES), default=list(_CASES))
    parser.add_argument("--add", action="store_true", help="keep the rows that the file has")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/eval/quantize.csv"))
    given = parser.parse_args()
    examples = held_out(given.questions, given.seed)
    plain_llm = LLM(CHECKPOINT, device=given.device)
    vision = RememberedVision(plain_llm.vision)
    plain = ask(plain_llm, examples, vision)
    samples = calibration_samples("scenes", given.samples)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    kept = _kept(given.out) if given.add else []
    with given.out.open("w", newline="") as file, tempfile.TemporaryDirectory() as directory:
        table = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(kept)
        fixed = {"questions": given.questions, "seed": given.seed}
        if not kept:
            row = {**fixed, **_row(plain, plain, examples)}
            table.writerow({**row, "scheme": "plain", "kv": KV_PLAIN})
        for kv in KV_CODED if "kv" in given.only else ():
            llm = LLM(CHECKPOINT, device=given.device, config=EngineConfig(kv=kv))
            row = _row(ask(llm, examples, vision), plain, examples)
            table.writerow({**fixed, **row, "scheme": "plain", "kv": kv, "method": "nearest"})
        for number, options in enumerate(case for name in given.only for case in _CASES[name]):
            out = Path(directory) / str(number)
            report = quantize_model(CHECKPOINT, out, options, samples=samples)
            seen = None if options.vision else vision
            row = _row(ask(LLM(out, device=given.device), examples, seen), plain, examples)
            table.writerow({**fixed, **row, **_facts(report), "samples": given.samples})
            file.flush()
            print(json.dumps({**row, **_facts(report)}), flush=True)


def _kept(file: Path) -> list[dict[str, Any]]:
    """The rows of a table that is to be added to; none where there is none yet."""
    if not file.is_file():
        return []
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def _row(answers: Answers, plain: Answers, examples: list[Example]) -> dict[str, Any]:
    measured = compare(answers, plain, examples)
    return {
        "correct": measured.correct, "accuracy": round(measured.correct / len(examples), 4),
        "same_tokens": round(measured.same_tokens, 4), "decoder_bytes": answers.decoder_bytes,
        "kv_fallbacks": answers.fallbacks,
    }  # fmt: skip


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    options, layers = report["options"], report["layers"]
    error = sum(layer["output_error"] for layer in layers)
    method = "nearest" if options["nearest"] or options["scheme"] == "fp8" else "searched"
    return {
        "scheme": options["scheme"], "kv": options["kv"], "group_size": options["group_size"],
        "method": method + ("+rotation" if options["rotate"] else ""),
        "layer_output_error": round(error / len(layers), 5), "head": options["head"],
        "vision": report["vision"] is not None,
        "vision_token_error": report["vision"] and round(report["vision"]["token_error"], 5),
    }  # fmt: skip


if __name__ == "__main__":
    main()
