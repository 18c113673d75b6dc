"""The vision side quantised on request: stored, named apart in the token cache, and served."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from epd.cache.keys import token_cache_key
from epd.engine import LLM
from epd.errors import CheckpointError, ConfigError
from epd.models.card import ModelCard
from epd.models.quantized_vision import vision_linears
from epd.models.tiny import write_tiny_llava
from epd.models.vision import VisionEncoder
from epd.quantize.calibration import Sample, embed
from epd.quantize.options import QuantizeOptions
from epd.quantize.run import REPORT, quantize_model
from epd.quantize.vision import quantize_vision
from epd.request import SamplingParams
from epd_kernels import Fp8Linear, QuantLinear

if TYPE_CHECKING:
    from pathlib import Path

_SCHEMES = ("w4a16", "qqq", "fireq", "fp8")


def _pixels(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8)


_SAMPLES = [Sample(f"What is in picture {n}?", (_pixels(n),), "a cat") for n in range(12)]
_SEEN = [_pixels(100 + n) for n in range(3)]


def _options(scheme: str, **more: Any) -> QuantizeOptions:
    return QuantizeOptions(scheme=scheme, steps=2, vision=True, **more)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    for scheme in _SCHEMES:
        quantize_model(tiny, root / scheme, _options(scheme), samples=_SAMPLES)
    return {scheme: root / scheme for scheme in _SCHEMES}


def _key(card: ModelCard) -> str:
    return token_cache_key(mm_hash="0" * 64, encoder_revision=card.encoder_revision,
                           pruner_fingerprint="", dtype="float32", salt="")  # fmt: skip


def test_cached_tokens_of_another_vision_side_have_other_keys(
    tiny: Path, quantized: dict[str, Path], tmp_path: Path
) -> None:
    plain = ModelCard.load(tiny)
    quantize_model(tiny, tmp_path / "text", QuantizeOptions(scheme="qqq", nearest=True),
                   samples=_SAMPLES)  # fmt: skip
    assert _key(ModelCard.load(tmp_path / "text")) == _key(plain)
    keys = {_key(ModelCard.load(path)) for path in quantized.values()}
    assert len(keys | {_key(plain)}) == 5


def test_equal_codes_under_other_arithmetic_have_other_keys(tiny: Path, tmp_path: Path) -> None:
    """Rounded to nearest, QQQ and FireQ store the same codes; their inputs are rounded apart."""
    revisions = []
    for scheme in ("qqq", "fireq"):
        quantize_model(tiny, tmp_path / scheme, _options(scheme, nearest=True), samples=_SAMPLES)
        revisions.append(ModelCard.load(tmp_path / scheme).encoder_revision)
    one, other = ((tmp_path / s / "vision.safetensors").read_bytes() for s in ("qqq", "fireq"))
    assert one == other
    assert revisions[0] != revisions[1]


@pytest.mark.parametrize("scheme", _SCHEMES)
def test_every_linear_layer_is_quantised_and_the_rest_copied(
    tiny: Path, quantized: dict[str, Path], scheme: str
) -> None:
    plain, made = (VisionEncoder.load(ModelCard.load(d)) for d in (tiny, quantized[scheme]))
    names = set(vision_linears(plain.parts))
    assert len(names) == 2 * 6 + 2
    assert vision_linears(made.parts) == {}
    kind = Fp8Linear if scheme == "fp8" else QuantLinear
    packed = [m for part in made.parts.values() for m in part.modules() if isinstance(m, kind)]
    assert len(packed) == len(names)
    assert made.resident_bytes() < 0.75 * plain.resident_bytes()
    others = {name: p for p, name in made._parameters()}
    for parameter, name in plain._parameters():
        if name.rsplit(".", 1)[0] not in names:
            assert torch.equal(others[name], parameter)
    report = json.loads((quantized[scheme] / REPORT).read_text())["vision"]
    assert list(report["modules"]) == ["layer 0", "layer 1", "projector"]
    assert [len(m["layers"]) for m in report["modules"].values()] == [6, 6, 2]
    assert report["kept"] == []
    assert 0 < report["token_error"] < (0.15 if scheme == "fp8" else 0.6)


def _written_out(plain: VisionEncoder, made: VisionEncoder) -> VisionEncoder:
    """`plain` with the weights that the codes of `made` stand for."""
    for name, linear in vision_linears(plain.parts).items():
        prefix, _, path = name.partition(".")
        module = made.parts[prefix].get_submodule(path)
        assert isinstance(module, QuantLinear)
        linear.weight.copy_(module.weight.unpack().dequantize())
    return plain


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_it_encodes_like_its_own_weights_written_out(tmp_path: Path, vision: str) -> None:
    model = write_tiny_llava(tmp_path / "model", vision=vision, center_crop=vision == "clip")
    quantize_model(model, tmp_path / "out", _options("w4a16"), samples=_SAMPLES)
    plain, made = (VisionEncoder.load(ModelCard.load(tmp_path / d)) for d in ("model", "out"))
    rough = plain.encode(_SEEN)
    wanted = _written_out(plain, made)
    needs = frozenset({"encoder_keys", "encoder_states"})
    needs |= {"cls_attention"} if vision == "clip" else set()
    pairs = zip(made.encode_inputs(_SEEN, needs), wanted.encode_inputs(_SEEN, needs), strict=True)
    for got, expected in pairs:
        for need in ("embeddings", *needs):
            torch.testing.assert_close(getattr(got, need), getattr(expected, need),
                                       rtol=1e-4, atol=1e-4)  # fmt: skip
    assert not torch.allclose(torch.stack(rough), torch.stack(made.encode(_SEEN)), atol=1e-3)


@pytest.mark.parametrize("scheme", ["w4a16", "fireq"])
def test_compensation_beats_rounding_to_nearest(tiny: Path, scheme: str) -> None:
    card = ModelCard.load(tiny)
    images = [image for sample in _SAMPLES for image in sample.images]
    reports = []
    for nearest in (True, False):
        encoder = VisionEncoder.load(card, dtype=torch.float32)
        options = _options(scheme, nearest=nearest).resolved(card.text)
        reports.append(quantize_vision(encoder, images, options)[1])
    rounded, searched = reports
    assert searched["token_error"] < 0.9 * rounded["token_error"]
    for module in rounded["modules"].values():
        assert module["output_error"] == pytest.approx(module["output_error_nearest"])
    for module in searched["modules"].values():
        assert module["output_error"] < module["output_error_nearest"]
        assert all(e["after"] < e["before"] for e in module["layers"].values())


def test_reported_errors_are_those_of_the_served_encoder(
    tiny: Path, quantized: dict[str, Path]
) -> None:
    images = [image for sample in _SAMPLES for image in sample.images]
    wanted, found = (
        torch.stack(VisionEncoder.load(ModelCard.load(d)).encode(images))
        for d in (tiny, quantized["qqq"])
    )
    report = json.loads((quantized["qqq"] / REPORT).read_text())["vision"]
    error = float((found - wanted).norm() / wanted.norm())
    assert report["token_error"] == pytest.approx(error, rel=1e-3)


def test_language_layers_are_calibrated_on_what_the_quantised_encoder_sees(
    tiny: Path, quantized: dict[str, Path], tmp_path: Path
) -> None:
    """The kept hidden states of the first sample hold the tokens of the encoder that is stored."""
    quantize_model(tiny, tmp_path / "out", _options("fp8", kv="int4", nearest=True),
                   samples=_SAMPLES)  # fmt: skip
    kept = load_file(tmp_path / "out" / "kv_sample.safetensors")["hidden"]
    encoder = VisionEncoder.load(ModelCard.load(tmp_path / "out"))
    seen = embed(ModelCard.load(tiny), _SAMPLES[:1], encoder).hidden
    torch.testing.assert_close(kept, seen[: len(kept)], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(kept, embed(ModelCard.load(tiny), _SAMPLES[:1]).hidden[: len(kept)])


def test_all_stages_in_one_answer_over_it(quantized: dict[str, Path]) -> None:
    llm = LLM(quantized["fireq"])
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    first, second = (
        llm.chat("What is this?", images=[image], sampling=sampling).token_ids
        for image in (_SEEN[0], _SEEN[0])
    )
    assert len(first) == 6
    assert first == second


def test_layers_that_the_kernels_do_not_take_stay_plain(tmp_path: Path) -> None:
    """A projector of 72 outputs: not a multiple of 16."""
    model = write_tiny_llava(tmp_path / "model", hidden_size=72)
    options = _options("fireq", group_size=0, nearest=True)
    report = quantize_model(model, tmp_path / "out", options, samples=_SAMPLES)
    projector = [f"multi_modal_projector.linear_{n}" for n in (1, 2)]
    assert report["vision"]["kept"] == projector
    card = ModelCard.load(tmp_path / "out")
    assert set(vision_linears(VisionEncoder.load(card).parts)) == set(projector)


def test_groups_are_the_largest_that_divide_each_input(tmp_path: Path) -> None:
    """The tower is 32 wide and 64 in between, whatever the language layers have."""
    model = write_tiny_llava(tmp_path / "model", hidden_size=128, head_dim=32)
    quantize_model(model, tmp_path / "out", _options("qqq", nearest=True), samples=_SAMPLES)
    stored = load_file(tmp_path / "out" / "vision.safetensors")
    groups = {
        stored[f"{name}.weight_codes"].shape[1] * 2 // stored[f"{name}.weight_scales"].shape[1]
        for name in {n.rpartition(".")[0] for n in stored}
    }
    assert groups == {32, 64, 128}


def test_without_pictures_it_is_refused_and_nothing_is_left(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No calibration sample has a picture"):
        quantize_model(tiny, tmp_path / "out", _options("fp8"), samples=[Sample("Just text.")])
    assert list(tmp_path.iterdir()) == []


def test_a_vision_weight_that_is_not_finite_is_named_and_nothing_is_left(
    tiny: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    tensors = load_file(model / "model.safetensors")
    tensors["vision_tower.encoder.layers.1.mlp.fc1.weight"][3, 3] = float("inf")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.fc1\.weight: expected finite"):
        quantize_model(model, tmp_path / "out", _options("w4a16"), samples=_SAMPLES)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class _Killed(BaseException):
    """As sudden as a signal."""


@pytest.mark.parametrize("when", ["vision layer 1", "layer 1"])
def test_killed_it_goes_on_and_ends_alike(
    tiny: Path, quantized: dict[str, Path], tmp_path: Path, when: str
) -> None:
    def stop(done: int, note: str) -> None:
        if note == when:
            raise _Killed

    out = tmp_path / "out"
    with pytest.raises(_Killed):
        quantize_model(tiny, out, _options("fireq"), samples=_SAMPLES, advance=stop)
    assert not out.exists()
    notes: list[str] = []
    quantize_model(tiny, out, _options("fireq"), samples=_SAMPLES,
                   advance=lambda done, note: notes.append(note))  # fmt: skip
    again = ["calibration", "vision layer 0", "vision layer 1", "projector", "layer 0"]
    assert notes == [*([] if when == "layer 1" else again), "layer 1", ""]
    for file in quantized["fireq"].rglob("*"):
        if file.is_file():
            assert (out / file.relative_to(quantized["fireq"])).read_bytes() == file.read_bytes()


def test_codes_without_a_declaration_are_refused(
    quantized: dict[str, Path], tmp_path: Path
) -> None:
    """What a reader that knows of no quantised vision side would copy as floats."""
    out = tmp_path / "out"
    shutil.copytree(quantized["fp8"], out)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"vision_tower.*expected plain floats.*F8_E4M3"):
        VisionEncoder.load(ModelCard.load(out))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", _SCHEMES)
def test_the_gpu_encodes_like_the_cpu(quantized: dict[str, Path], scheme: str) -> None:
    """As near to the CPU's fp32 as the CPU's own bf16 is, whose roundings tip FP8 codes over."""
    card = ModelCard.load(quantized[scheme])

    def tokens(device: str, dtype: torch.dtype) -> torch.Tensor:
        encoder = VisionEncoder.load(card, device, dtype)
        return torch.stack(encoder.encode(_SEEN)).float().cpu()

    wanted = tokens("cpu", torch.float32)
    noise = float((tokens("cpu", torch.bfloat16) - wanted).norm())
    assert float((tokens("cuda", torch.bfloat16) - wanted).norm()) < 1.5 * noise
