"""The LM head in FP8: what is stored, what it computes, and which heads are refused."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from epd.engine import LLM
from epd.errors import CheckpointError, ConfigError
from epd.models.card import ModelCard
from epd.models.checkpoint import Checkpoint
from epd.models.decoder import Decoder
from epd.models.tiny import write_tiny_llava
from epd.quantize import head as head_module
from epd.quantize.calibration import Sample
from epd.quantize.options import QuantizeOptions
from epd.quantize.run import quantize_model
from epd.request import SamplingParams
from epd_kernels import Fp8Linear

if TYPE_CHECKING:
    from pathlib import Path

_SAMPLES = [Sample(f"what is number {n}?", (), "a thing") for n in range(3)]
_KINDS = ("untied", "tied", "tied, stored as the head", "tied, driven apart")


def _rewritten(directory: Path, change: Any) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})


@pytest.fixture(params=_KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The vocabulary has 261 tokens, which the vendor's FP8 product does not take as they are."""
    directory = write_tiny_llava(tmp_path / "model", tied=request.param != "untied")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        embedding = next(name for name in tensors if "embed_tokens" in name)
        if request.param == "tied, stored as the head":
            tensors["language_model.lm_head.weight"] = tensors.pop(embedding)
        if request.param == "tied, driven apart":
            tensors["lm_head.weight"] = tensors[embedding] * 1.5 + 0.01

    _rewritten(directory, change)
    return directory


def _quantized(model: Path, out: Path, scheme: str = "fireq", **more: Any) -> dict[str, Any]:
    options = QuantizeOptions(scheme=scheme, steps=2, **more)
    return quantize_model(model, out, options, samples=_SAMPLES)


def test_scores_are_those_of_rounded_rows_and_rounded_inputs(model: Path, tmp_path: Path) -> None:
    report = _quantized(model, tmp_path / "out")
    plain, made = (Decoder.load(ModelCard.load(d)) for d in (model, tmp_path / "out"))
    assert isinstance(made.head, Fp8Linear)
    assert torch.equal(made.embedding, plain.embedding)
    weight = plain.embedding if plain.head is None else plain.head
    assert isinstance(weight, torch.Tensor)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        step = rows.abs().amax(1, keepdim=True) / 448
        return (rows / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step

    got = made.logits(x)
    assert got.shape == (5, 261)
    torch.testing.assert_close(got, rounded(x) @ rounded(weight).t(), rtol=1e-4, atol=1e-4)
    assert 0 < report["head"]["output_error"] < 0.04


def test_the_reported_error_is_that_of_the_scores(tmp_path: Path) -> None:
    """Against the scores of what leaves the last layer, whose embedding the samples are."""
    model = write_tiny_llava(tmp_path / "model", num_layers=1)
    hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    card = ModelCard.load(model)
    with Checkpoint(card) as checkpoint:
        stored, report = head_module.quantize_head(checkpoint, card.text, hidden)
        weight = checkpoint.tensor("lm_head.weight").float()
        norm = checkpoint.tensor("language_model.norm.weight").float()
    x = hidden * (hidden.square().mean(1, keepdim=True) + card.text.rms_norm_eps).rsqrt() * norm
    found = stored["weight"].float() * stored["weight_scale"]
    wrong = (x @ (found - weight).t()).norm() / (x @ weight.t()).norm()
    assert report["output_error"] == pytest.approx(float(wrong), rel=1e-3)


def test_rows_are_rounded_alike_however_many_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = ModelCard.load(write_tiny_llava(tmp_path / "model"))
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    made = []
    for rows in (8192, 100):
        monkeypatch.setattr(head_module, "_ROWS", rows)
        with Checkpoint(card) as checkpoint:
            made.append(head_module.quantize_head(checkpoint, card.text, hidden))
    (one, first), (other, second) = made
    assert all(torch.equal(one[k].view(torch.uint8), other[k].view(torch.uint8)) for k in one)
    assert first["output_error"] == pytest.approx(second["output_error"], rel=1e-4)


@pytest.mark.parametrize(
    ("scheme", "asked", "found"),
    [("w4a16", None, 1), ("qqq", None, 1), ("fireq", None, 2), ("fp8", None, 2),
     ("w4a16", "fp8", 2), ("fireq", "bf16", 1)],
)  # fmt: skip
def test_version_1_is_written_where_nothing_else_is_needed(
    tmp_path: Path, scheme: str, asked: str | None, found: int
) -> None:
    model = write_tiny_llava(tmp_path / "model", num_layers=1, tied=True)
    _quantized(model, tmp_path / "out", scheme, head=asked, nearest=True)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["format_version"] == found
    decoder = Decoder.load(ModelCard.load(tmp_path / "out"))
    assert isinstance(decoder.head, Fp8Linear) == (found == 2)
    # an output of before has neither of these words, and no head of its own
    if found == 1:
        del section["head"], section["vision"]
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        (tmp_path / "out" / "config.json").write_text(
            json.dumps({**config, "quantization_config": section})
        )
        assert Decoder.load(ModelCard.load(tmp_path / "out")).head is None


def test_it_answers_over_a_quantised_head(tmp_path: Path) -> None:
    model = write_tiny_llava(tmp_path / "model")
    _quantized(model, tmp_path / "out", "fp8")
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    llm = LLM(tmp_path / "out")
    tokens = llm.chat("What is this?", sampling=sampling).token_ids
    assert len(tokens) == 8
    assert max(tokens) < 261


def test_the_head_rests_and_moves_with_its_decoder(tmp_path: Path) -> None:
    model = write_tiny_llava(tmp_path / "model")
    _quantized(model, tmp_path / "out", "fp8")
    decoder = Decoder.load(ModelCard.load(tmp_path / "out"))
    head = decoder.head
    assert isinstance(head, Fp8Linear)
    x = torch.randn(2, 64)
    before = decoder.logits(x)
    decoder._apply(lambda tensor: tensor.clone())
    assert torch.equal(decoder.logits(x), before)
    assert head.resident_bytes() == 272 * (64 + 4)
    plain = sum(p.numel() * p.element_size() for p in decoder.parameters())
    assert decoder.resident_bytes() > plain + head.resident_bytes()


def test_a_head_that_is_not_finite_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    model = write_tiny_llava(tmp_path / "model")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(n for n in tensors if "lm_head" in n)][7, 3] = float("nan")

    _rewritten(model, spoil)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected finite numbers"):
        _quantized(model, tmp_path / "out", "fp8")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_head_of_no_multiple_of_16_stays_plain_unless_asked_for(tmp_path: Path) -> None:
    card = ModelCard.load(write_tiny_llava(tmp_path / "model", hidden_size=72))
    given = {"scheme": "fireq", "group_size": 0}
    assert QuantizeOptions(**given).resolved(card.text).head == "bf16"
    with pytest.raises(ConfigError, match="hidden_size = 72 cannot be in FP8"):
        QuantizeOptions(**given, head="fp8").resolved(card.text)


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="Unknown format 'int4' of the head"):
        QuantizeOptions(scheme="fireq", head="int4")


# --- heads of other writers

_FP8 = {"weights": {"num_bits": 8, "type": "float"},
        "input_activations": {"num_bits": 8, "type": "float"}}  # fmt: skip
_INT4 = {"weights": {"num_bits": 4, "type": "int"}, "input_activations": None}


def _foreign(directory: Path, head: dict[str, torch.Tensor], groups: dict[str, Any]) -> ModelCard:
    """The tiny model with another head, and the declaration of compressed-tensors."""
    write_tiny_llava(directory)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in tensors if "lm_head" in n)
        del tensors[name]
        tensors.update({f"{name.removesuffix('weight')}{k}": v for k, v in head.items()})

    _rewritten(directory, change)
    config = json.loads((directory / "config.json").read_text())
    section = {"quant_method": "compressed-tensors", "config_groups": groups}
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    return ModelCard.load(directory)


@pytest.mark.parametrize("scale", [(261, 1), (1,)])
def test_an_fp8_head_of_compressed_tensors_is_served(
    tmp_path: Path, scale: tuple[int, ...]
) -> None:
    weight = torch.randn(261, 64, generator=torch.Generator().manual_seed(2))
    codes, scales = weight.to(torch.float8_e4m3fn), torch.rand(scale).bfloat16() + 0.5
    groups = {"layers": {**_INT4, "targets": ["Linear"]},
              "head": {**_FP8, "targets": ["re:.*lm_head$"]}}  # fmt: skip
    card = _foreign(tmp_path / "m", {"weight": codes, "weight_scale": scales}, groups)
    assert card.quantization is not None
    assert card.quantization.scheme == "w4a16"
    x = torch.eye(64)  # one number per token: e4m3 holds it exactly, but for the scale's rounding
    wanted = (codes.float() * scales.float().view(-1, 1)).t()
    torch.testing.assert_close(Decoder.load(card).logits(x), wanted, rtol=1e-5, atol=1e-6)


_HEADS = {
    "int8": (
        {"weight": torch.zeros(261, 64, dtype=torch.int8), "weight_scale": torch.ones(261, 1)},
        r"lm_head\.weight_scale: expected a plain head, or e4m3.*found codes in I8",
    ),
    "packed": (
        {"weight_packed": torch.zeros(261, 8, dtype=torch.int32),
         "weight_scale": torch.ones(261, 1)},
        r"lm_head\.weight_packed: expected a plain head.*found codes in I32",
    ),
    "gptq": (
        {"qweight": torch.zeros(8, 261, dtype=torch.int32)},
        r"lm_head\.qweight: expected a plain head.*found codes in I32",
    ),
    "no scale": (
        {"weight": torch.zeros(261, 64).to(torch.float8_e4m3fn)},
        r"lm_head\.weight: expected plain floats, found F8_E4M3 codes",
    ),
    "blocks": (
        {"weight": torch.zeros(261, 64).to(torch.float8_e4m3fn),
         "weight_scale": torch.ones(9, 2)},
        r"lm_head\.weight_scale: expected \[261, 1\] or one number, found \[9, 2\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(_HEADS))
def test_other_heads_are_refused_by_name(tmp_path: Path, case: str) -> None:
    head, named = _HEADS[case]
    card = _foreign(tmp_path / "m", head, {"layers": {**_INT4, "targets": ["Linear"]}})
    with pytest.raises(CheckpointError, match=named):
        Decoder.load(card)


def test_a_head_declared_in_four_bits_is_refused(tmp_path: Path) -> None:
    groups = {"layers": {**_FP8, "targets": ["Linear"]},
              "head": {**_INT4, "targets": ["lm_head"]}}  # fmt: skip
    with pytest.raises(CheckpointError, match="a head that is not in FP8"):
        _foreign(tmp_path / "m", {"weight": torch.zeros(261, 64)}, groups)


@pytest.mark.parametrize("declared", [True, False])
def test_an_embedding_in_codes_is_refused_by_name(tmp_path: Path, declared: bool) -> None:
    """Copied as floats, its codes would be read without their scales."""
    out = tmp_path / "out"
    _quantized(write_tiny_llava(tmp_path / "model"), out, "fp8", nearest=True)
    file = out / "unquantized.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "embed_tokens" in n)
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file, {"format": "pt"})
    if not declared:
        shutil.copytree(out, tmp_path / "silent")
        out = tmp_path / "silent"
        config = json.loads((out / "config.json").read_text())
        del config["quantization_config"]
        (out / "config.json").write_text(json.dumps(config))
    named = r"expected plain floats, found F8_E4M3 codes"
    with pytest.raises(CheckpointError, match=named):
        Decoder.load(ModelCard.load(out))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 33])
def test_the_gpu_scores_like_the_cpu(tmp_path: Path, tokens: int) -> None:
    _quantized(write_tiny_llava(tmp_path / "model"), tmp_path / "out", "fp8")
    card = ModelCard.load(tmp_path / "out")
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    wanted = Decoder.load(card).logits(x.float())
    got = Decoder.load(card, "cuda").logits(x.to("cuda")).cpu()
    assert got.shape == (tokens, 261)
    assert float((got - wanted).norm() / wanted.norm()) < 8e-3
