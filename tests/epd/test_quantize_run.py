"""A whole checkpoint: what is written, when it appears, how it is served, how it is resumed."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from epd.demo import CHECKPOINT
from epd.demo.examples import held_out
from epd.engine import LLM
from epd.errors import CheckpointError, ConfigError
from epd.images import rgb_array
from epd.models.card import ModelCard
from epd.models.checkpoint import Checkpoint
from epd.models.decoder import Decoder
from epd.models.layouts import read_linear
from epd.models.quantized_layers import layer_sources
from epd.models.tiny import write_tiny_llava
from epd.quantize import run, workspace
from epd.quantize.calibration import Sample, embed, from_directory, from_scenes
from epd.quantize.options import QuantizeOptions
from epd.quantize.run import REPORT, calibration_samples, quantize_model
from epd.request import SamplingParams
from epd_kernels import Fp8Linear

if TYPE_CHECKING:
    from pathlib import Path

_SCHEMES = ("w4a16", "qqq", "fireq", "fp8")
_GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def _pixels(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8)


_SAMPLES = [Sample(f"What is in picture {n}?", (_pixels(n),), "a cat") for n in range(6)]


def _options(scheme: str, **more: Any) -> QuantizeOptions:
    return QuantizeOptions(scheme=scheme, steps=3, **more)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """qwen2 has biases; this one shares its embedding with the head, and its tensors are bf16."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_llava(directory, text="qwen2", tied=True, num_layers=3)
    file = directory / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    for scheme in _SCHEMES:
        quantize_model(tiny, root / scheme, _options(scheme), samples=_SAMPLES)
    return {scheme: root / scheme for scheme in _SCHEMES}


def _ask(model: Path) -> list[list[int]]:
    llm = LLM(model)
    questions = ["What is this?", "How many?", "Describe it, please."]
    images = [[_pixels(100 + n)] for n in range(3)]
    return [c.token_ids for c in llm.chat(questions, images=images, sampling=_GREEDY)]


def _widened(directory: Path, out: Path) -> Path:
    """The checkpoint with its quantised layers written out as plain fp32 matrices."""
    card = ModelCard.load(directory)
    assert card.quantization is not None
    shutil.copytree(directory, out)
    tensors: dict[str, torch.Tensor] = {}
    with Checkpoint(card) as checkpoint:
        for _, sources in layer_sources(checkpoint, card.text, card.quantization):
            for source in sources:
                name = f"{source.prefix}.weight"
                tensors[name] = read_linear(source).weight.dequantize()
                if source.has("bias"):
                    tensors[f"{source.prefix}.bias"] = source.get("bias", (torch.float32,))
        plain = [n for n in checkpoint.names("") if not n.startswith("language_model.layers.")]
        norms = [n for n in checkpoint.names("language_model.layers.") if "norm" in n]
        tensors |= {name: checkpoint.tensor(name) for name in plain + norms}
    for file in out.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_w4a16_answers_like_its_own_weights_written_out(
    quantized: dict[str, Path], tmp_path: Path
) -> None:
    assert _ask(quantized["w4a16"]) == _ask(_widened(quantized["w4a16"], tmp_path / "plain"))


@pytest.mark.parametrize("scheme", _SCHEMES)
def test_the_vision_side_is_untouched_and_the_decoder_smaller(
    tiny: Path, quantized: dict[str, Path], scheme: str
) -> None:
    before, after = ModelCard.load(tiny), ModelCard.load(quantized[scheme])
    assert after.encoder_revision == before.encoder_revision
    assert after.revision != before.revision
    assert after.dtype == "bfloat16"
    plain, small = (Decoder.load(c, dtype=torch.bfloat16) for c in (before, after))
    layers = sum(p.numel() for p in plain.layers.parameters())
    head = small.head.resident_bytes() if isinstance(small.head, Fp8Linear) else 0
    assert (head > 0) == (scheme in ("fireq", "fp8"))
    saved = plain.resident_bytes() - (small.resident_bytes() - head)
    assert saved > (0.7 if scheme == "fp8" else 0.9) * layers


@pytest.mark.parametrize("scheme", _SCHEMES)
def test_the_report_says_what_was_measured(quantized: dict[str, Path], scheme: str) -> None:
    report = json.loads((quantized[scheme] / REPORT).read_text())
    assert len(report["layers"]) == 3
    for layer in report["layers"]:
        assert len(layer["layers"]) == 7
        assert 0 < layer["output_error"] <= 1.05 * layer["output_error_nearest"] < 0.5
    config = json.loads((quantized[scheme] / "config.json").read_text())["quantization_config"]
    told = ("fp8", 2) if scheme in ("fireq", "fp8") else ("bf16", 1)
    assert (config["quant_method"], config["head"], config["format_version"]) == ("epd", *told)
    assert (0 < report["head"]["output_error"] < 0.03) if told[1] == 2 else report["head"] is None
    assert config["group_size"] == (None if scheme == "fp8" else 64)


@pytest.mark.parametrize("scheme", _SCHEMES)
def test_a_served_layer_is_the_stored_weights_on_rounded_inputs(
    quantized: dict[str, Path], scheme: str
) -> None:
    card = ModelCard.load(quantized[scheme])
    assert card.quantization is not None
    decoder = Decoder.load(card)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    with Checkpoint(card) as checkpoint:
        for path, sources in layer_sources(checkpoint, card.text, card.quantization):
            layers = [read_linear(source) for source in sources]
            rows = x[:, : sources[0].width]
            seen = rows
            if scheme == "qqq":
                step = rows.abs().amax(1, keepdim=True) / 127
                seen = (rows / step).round() * step
            elif scheme != "w4a16":
                step = rows.abs().amax(1, keepdim=True) / 448
                seen = (rows / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step
            wanted = seen @ torch.cat([layer.weight.dequantize() for layer in layers]).t()
            if layers[0].bias is not None:
                wanted = wanted + torch.cat([layer.bias.float() for layer in layers])
            got = decoder.get_submodule(path)(rows)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


class _Killed(BaseException):
    """As sudden as a signal: no handler of `Exception` sees it."""


def _files(directory: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()
    }


@pytest.mark.parametrize("when", ["layer 2", "hidden-2", "layer-1.json", "config.json", "rename"])
def test_killed_anywhere_it_leaves_nothing_and_goes_on_where_it_was(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    out, options = tmp_path / "out", _options("w4a16")
    replace, rename = workspace.os.replace, workspace.os.rename

    def dying_replace(source: Any, target: Any) -> None:
        if when in str(target):
            raise _Killed
        replace(source, target)

    def dying_rename(source: Any, target: Any) -> None:
        if when == "rename":
            raise _Killed
        rename(source, target)

    def advance(done: int, note: str) -> None:
        if note == when:
            raise _Killed

    with monkeypatch.context() as patched:
        patched.setattr(workspace.os, "replace", dying_replace)
        patched.setattr(workspace.os, "rename", dying_rename)
        with pytest.raises(_Killed):
            quantize_model(tiny, out, options, samples=_SAMPLES, advance=advance)
    assert not out.exists()

    done: list[str] = []
    quantize_model(tiny, out, options, samples=_SAMPLES, advance=lambda n, note: done.append(note))
    expected = {"layer 2": ["layer 2"], "hidden-2": ["layer 1", "layer 2"],
                "layer-1.json": ["layer 1", "layer 2"]}.get(when, [])  # fmt: skip
    assert [note for note in done if note.startswith("layer")] == expected
    whole = tmp_path / "whole"
    quantize_model(tiny, whole, options, samples=_SAMPLES)
    assert _files(out) == _files(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_another_plan_starts_over(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(done: int, note: str) -> None:
        if note == "layer 1":
            raise _Killed

    with pytest.raises(_Killed):
        quantize_model(tiny, out, _options("w4a16"), samples=_SAMPLES, advance=stop)
    done: list[str] = []
    quantize_model(tiny, out, _options("fp8"), samples=_SAMPLES,
                   advance=lambda n, note: done.append(note))  # fmt: skip
    assert done == ["calibration", "layer 0", "layer 1", "layer 2", ""]


def test_two_at_once_and_a_taken_place_are_refused(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with workspace.Workspace(out).opened({}), pytest.raises(ConfigError, match="Another process"):
        quantize_model(tiny, out, _options("fp8"), samples=_SAMPLES)
    (out / "mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match="exists already"):
        quantize_model(tiny, out, _options("fp8"), samples=_SAMPLES)
    assert [p.name for p in out.iterdir()] == ["mine"]
    with pytest.raises(ConfigError, match="inside the model"):
        quantize_model(tiny, tiny / "out", _options("fp8"), samples=_SAMPLES)


def test_what_is_quantised_is_not_quantised_again(
    quantized: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="quantised already"):
        quantize_model(quantized["qqq"], tmp_path / "out", _options("qqq"), samples=_SAMPLES)


def test_a_checkpoint_cut_short_is_named(quantized: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "cut"
    shutil.copytree(quantized["fireq"], directory)
    file = directory / "layer-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"layer-00001.*\n.*ends inside tensor"):
        ModelCard.load(directory)


def test_a_fused_layer_half_quantised_is_refused(
    tiny: Path, quantized: dict[str, Path], tmp_path: Path
) -> None:
    directory = tmp_path / "mixed"
    shutil.copytree(quantized["w4a16"], directory)
    file = directory / "layer-00000.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("k_proj.weight_codes"))
    tensors[key.replace("weight_codes", "weight")] = torch.zeros(32, 64)
    save_file({k: v for k, v in tensors.items() if "k_proj.weight_" not in k}, file)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        **{k: f for k, f in index["weight_map"].items() if f != file.name},
        **dict.fromkeys(load_file(file), file.name),
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight: expected quantised weights"):
        Decoder.load(ModelCard.load(directory))


def test_nan_in_calibration_is_named(tiny: Path, tmp_path: Path) -> None:
    directory = tmp_path / "nan"
    shutil.copytree(tiny, directory)
    tensors = load_file(directory / "model.safetensors")
    name = next(n for n in tensors if n.endswith("embed_tokens.weight"))
    tensors[name][ord("a") % 97 + 40 :] = float("nan")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"sample 0.*NaN"):
        quantize_model(directory, tmp_path / "out", _options("qqq"), samples=_SAMPLES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"scheme": "w3"}, "w3"),
        ({"scheme": "qqq", "group_size": 48}, "48"),
        ({"scheme": "qqq", "steps": 1}, "steps"),
    ],
)
def test_impossible_options_are_refused(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        QuantizeOptions(**bad)


def test_a_group_size_must_divide_every_input(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"128 inputs do not divide hidden_size = 64"):
        quantize_model(tiny, tmp_path / "o", _options("qqq", group_size=128), samples=_SAMPLES)


def test_calibration_from_a_directory(tmp_path: Path) -> None:
    Image.fromarray(_pixels(0)).save(tmp_path / "b.png")
    Image.fromarray(_pixels(1)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("What?\n")
    (tmp_path / "c.txt").write_text("Just text.")
    samples = from_directory(tmp_path, 9)
    assert [s.question for s in samples] == ["What?", "Describe the picture.", "Just text."]
    assert np.array_equal(samples[0].images[0], _pixels(1))
    assert [s.question for s in from_directory(tmp_path, 1)] == ["What?"]
    with pytest.raises(ConfigError, match="no directory"):
        calibration_samples(str(tmp_path / "none"), 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither pictures"):
        calibration_samples(str(tmp_path / "empty"), 1)
    with pytest.raises(ConfigError, match="below 1"):
        calibration_samples("scenes", 0)


def test_hidden_states_are_what_the_engine_would_feed(tiny: Path) -> None:
    card, sample = ModelCard.load(tiny), _SAMPLES[0]
    calibration = embed(card, [sample])
    llm = LLM(tiny)
    tokens = llm.vision.encode(list(sample.images))[0]
    found = [
        start
        for start in range(len(calibration.hidden) - len(tokens) + 1)
        if torch.allclose(calibration.hidden[start : start + len(tokens)], tokens, atol=1e-5)
    ]
    assert len(found) == 1
    assert calibration.sequences.lengths == (len(calibration.hidden),)


def test_the_built_in_model_keeps_its_answers(tmp_path: Path) -> None:
    report = quantize_model(
        CHECKPOINT, tmp_path / "fireq", _options("fireq", search_tokens=600),
        samples=from_scenes(3),
    )  # fmt: skip
    for layer in report["layers"]:
        assert layer["output_error"] < 0.7 * layer["output_error_nearest"]
    examples = held_out(4, 1)
    llm = LLM(tmp_path / "fireq")
    answers = llm.chat(
        [e.question for e in examples],
        images=[[rgb_array(i) for i in e.images] for e in examples],
        sampling=SamplingParams(temperature=0.0, max_tokens=32),
    )
    assert sum(a.text.strip() == e.answer for a, e in zip(answers, examples, strict=True)) >= 3
    assert run.REPORT in {file.name for file in (tmp_path / "fireq").iterdir()}
