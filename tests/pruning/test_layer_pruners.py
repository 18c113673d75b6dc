"""Methods inside the decoder against eager attention maps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from epd_pruning import PruningError, available, fingerprint, layer_pruner
from epd_pruning.adaptinfer import AdaptInfer
from epd_pruning.dart import least_duplicated
from epd_pruning.layer_base import LayerInputs, LayerPruner
from epd_pruning.layer_rivals import DartLayer, FastV, PyramidDrop
from epd_pruning.schedule import Schedule
from epd_pruning.selection import cosine_matrix, stable_top_k
from epd_pruning.sparsevlm import SparseVLM, density_peak_means, num_recycled

ONE = Schedule((1,), (7,))


def boundary(seed: int = 0, num_vision: int = 30, num_text: int = 9) -> tuple[LayerInputs, Tensor]:
    """A boundary of 4 query heads on 2 key heads, and its whole attention map [4, L, L]."""
    generator = torch.Generator().manual_seed(seed)
    length = 2 + num_vision + num_text
    queries = 2 * torch.randn(4, length, 8, generator=generator)
    keys = torch.randn(2, length, 8, generator=generator)
    logits = queries @ keys.repeat_interleave(2, dim=0).mT * 0.5
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    text = 2 + num_vision + torch.arange(num_text)
    inputs = LayerInputs(
        queries=queries[:, text],
        keys=keys,
        vision=2 + torch.arange(num_vision),
        text=text,
        scale=0.5,
        hidden=torch.randn(length, 16, generator=generator),
    )
    return inputs, logits.masked_fill(~causal, -torch.inf).softmax(-1)


def kept_by(score: Tensor, inputs: LayerInputs, count: int) -> list[int]:
    return sorted(inputs.vision[stable_top_k(score, count)].tolist())


def adaptinfer_eager(inputs: LayerInputs, attention: Tensor, blend: float) -> Tensor:
    block = attention[:, inputs.text][:, :, inputs.text]
    symmetric = block + block.mT - torch.diag_embed(block.diagonal(dim1=1, dim2=2))
    symmetric = blend * symmetric + (1 - blend) * symmetric.mean()
    prior = symmetric.sum(1)
    return (prior[:, :, None] * attention[:, inputs.text][:, :, inputs.vision]).sum((0, 1))


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_adaptinfer_equals_its_eager_form(seed: int, blend: float) -> None:
    inputs, attention = boundary(seed)
    expected = adaptinfer_eager(inputs, attention, blend)
    pruner = AdaptInfer(ONE, blend=blend)
    torch.testing.assert_close(pruner.score(inputs), expected, rtol=1e-4, atol=1e-6)
    kept = pruner.select(inputs, 0, 30).vision
    assert kept.tolist() == kept_by(expected, inputs, 7)


def test_without_the_prior_it_is_the_plain_sum_over_text() -> None:
    inputs, attention = boundary(4)
    plain = attention[:, inputs.text][:, :, inputs.vision].sum((0, 1))
    score = AdaptInfer(ONE, blend=0.0).score(inputs)
    torch.testing.assert_close(score / score.sum(), plain / plain.sum())
    assert not torch.allclose(AdaptInfer(ONE).score(inputs) / score.sum(), plain / plain.sum())


def test_one_text_token_scores_by_its_own_row() -> None:
    inputs, attention = boundary(5, num_text=1)
    row = attention[:, inputs.text[0]]
    expected = (row[:, inputs.text[0], None] * row[:, inputs.vision]).sum(0)
    torch.testing.assert_close(AdaptInfer(ONE).score(inputs), expected)


def test_a_prior_window_listens_to_the_last_text_only() -> None:
    inputs, _ = boundary(6)
    windowed = AdaptInfer(ONE, prior_window=3).score(inputs)
    last = replace(inputs, queries=inputs.queries[:, -3:], text=inputs.text[-3:])
    torch.testing.assert_close(windowed, AdaptInfer(ONE).score(last))
    whole = AdaptInfer(ONE, prior_window=9).score(inputs)
    assert torch.equal(whole, AdaptInfer(ONE).score(inputs))


@pytest.mark.parametrize("cls", [FastV, PyramidDrop])
def test_the_last_row_votes_with_the_mean_over_heads(cls: type[LayerPruner]) -> None:
    inputs, attention = boundary(8)
    expected = attention[:, -1, inputs.vision].mean(0)
    torch.testing.assert_close(cls(ONE).score(inputs), expected)
    assert cls(ONE).select(inputs, 0, 30).vision.tolist() == kept_by(expected, inputs, 7)


def test_only_pyramiddrop_reads_the_next_layer() -> None:
    reads = {name: layer_pruner(name, ONE).reads for name in available("layer")}
    assert {name for name, which in reads.items() if which == "next"} == {"pyramiddrop"}


def test_sparsevlm_raters_are_the_text_most_of_the_image_resembles() -> None:
    vision = torch.tensor([[4.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    share = (vision @ text.mT).softmax(1).mean(0)
    raters = SparseVLM(ONE).choose_raters(vision, text)
    assert raters is not None
    assert raters.tolist() == (share > 1 / 3).tolist() == [True, False, False]
    assert SparseVLM(ONE).choose_raters(vision, text[:1]).tolist() == [True]  # type: ignore[union-attr]


def test_sparsevlm_averages_heads_and_raters() -> None:
    inputs, attention = boundary(9)
    raters = torch.tensor([True, False, True, True, False, False, False, False, True])
    rows = inputs.text[raters]
    expected = attention[:, rows][:, :, inputs.vision].mean((0, 1))
    pruner = SparseVLM(ONE)
    torch.testing.assert_close(pruner.score(replace(inputs, raters=raters)), expected)
    with pytest.raises(PruningError, match="raters"):
        pruner.select(inputs, 0, 30)


def test_sparsevlm_recycles_the_best_of_the_dropped() -> None:
    inputs, _ = boundary(10)
    inputs = replace(inputs, raters=torch.ones(9, dtype=torch.bool))
    plain, recycling = SparseVLM(ONE), SparseVLM(ONE, recycling=True)
    selection = recycling.select(inputs, 0, 30)
    assert torch.equal(selection.vision, plain.select(inputs, 0, 30).vision)
    assert plain.select(inputs, 0, 30).recycled is None
    # 23 dropped, 7 looked at again, one mean
    again = stable_top_k(plain.score(inputs), 14)[7:]
    assert inputs.hidden is not None and selection.recycled is not None
    expected = inputs.hidden[inputs.vision[again]].mean(0, keepdim=True)
    torch.testing.assert_close(selection.recycled, expected)
    same = recycling.select(inputs, 0, 30).recycled
    assert same is not None and torch.equal(same, selection.recycled)


@pytest.mark.parametrize(("dropped", "means"), [(1, 1), (23, 1), (40, 2), (510, 16)])
def test_recycled_rows_are_counted(dropped: int, means: int) -> None:
    assert num_recycled(dropped) == means


def test_density_peaks_find_separate_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 20 * torch.eye(3, 8)
    rows = torch.cat([centre + 0.1 * torch.randn(9, 8, generator=generator) for centre in centres])
    means = density_peak_means(rows, 3, noise=1e-6 * torch.rand(27, generator=generator))
    expected = rows.view(3, 9, 8).mean(1)
    torch.testing.assert_close(means[means.argmax(1).argsort()], expected)


def test_dart_layer_takes_pivots_by_key_norm() -> None:
    inputs, _ = boundary(11)
    assert inputs.hidden is not None
    strength = inputs.keys[:, inputs.vision].abs().sum(2).sum(0)
    similarity = cosine_matrix(inputs.hidden[inputs.vision])
    expected = inputs.vision[least_duplicated(similarity, strength, 7, 2)].sort().values
    assert torch.equal(DartLayer(ONE, num_pivots=2).select(inputs, 0, 30).vision, expected)
    with pytest.raises(PruningError, match="hidden"):
        DartLayer(ONE).select(replace(inputs, hidden=None), 0, 30)


@pytest.mark.parametrize("name", available("layer"))
def test_stages_that_cannot_or_need_not_prune_keep_everything(name: str) -> None:
    pruner = layer_pruner(name, Schedule((0, 1), (30, 12)))
    inputs, _ = boundary(12)
    assert pruner.select(inputs, 0, 30).vision is inputs.vision
    silent = replace(inputs, queries=inputs.queries[:, :0], text=inputs.text[:0])
    assert pruner.select(silent, 1, 30).vision is inputs.vision
    fewer = replace(inputs, vision=inputs.vision[:12])
    assert pruner.select(fewer, 1, 30).vision is fewer.vision


@pytest.mark.parametrize("name", available("layer"))
@pytest.mark.parametrize("count", [1, 5, 29])
def test_exact_sorted_deterministic(name: str, count: int) -> None:
    pruner = layer_pruner(name, Schedule((0,), (count,)))
    inputs = replace(boundary(13)[0], raters=torch.ones(9, dtype=torch.bool))
    kept = pruner.select(inputs, 0, 30).vision
    assert kept.shape == (count,) and bool((kept.diff() > 0).all())
    assert set(kept.tolist()) <= set(inputs.vision.tolist())
    assert torch.equal(kept, pruner.select(inputs, 0, 30).vision)


def test_a_stage_may_empty_the_image() -> None:
    inputs, _ = boundary(14)
    assert AdaptInfer(Schedule((0,), (0,))).select(inputs, 0, 30).vision.shape == (0,)


def test_ties_go_to_the_lowest_row() -> None:
    inputs, _ = boundary(15)
    flat = replace(inputs, keys=torch.zeros_like(inputs.keys))
    assert AdaptInfer(ONE).select(flat, 0, 30).vision.tolist() == list(range(2, 9))


def test_presets_and_parameters_are_checked() -> None:
    preset = layer_pruner("adaptinfer", "llava-1.5-7b/64")
    assert preset.schedule == Schedule((1, 10, 20), (133, 27, 3))
    for call, field in (
        (lambda: layer_pruner("adaptinfer", "64"), "schedule"),
        (lambda: layer_pruner("script", ONE), "method"),
        (lambda: layer_pruner("adaptinfer", ONE, params={"blend": 2.0}), "blend"),
        (lambda: layer_pruner("adaptinfer", ONE, params={"schedule": 3}), "schedule"),
        (lambda: layer_pruner("adaptinfer", ONE, params={"prior_window": -1}), "prior_window"),
    ):
        with pytest.raises(PruningError) as caught:
            call()
        assert caught.value.field == field


def test_fingerprint_follows_the_schedule() -> None:
    prints = {
        fingerprint(layer_pruner(name, schedule))
        for name in available("layer")
        for schedule in (ONE, Schedule((1,), (8,)), Schedule((1,), ratios=(0.5,)))
    }
    assert len(prints) == 3 * len(available("layer"))


def test_misfitting_tensors_are_named() -> None:
    inputs, _ = boundary(16)
    for change in ({"text": inputs.text[:-1]}, {"keys": torch.zeros(3, 41, 8)}):
        with pytest.raises(PruningError):
            replace(inputs, **change)


def test_scoring_cost() -> None:
    sizes = {"num_text": 64, "num_vision": 576, "num_heads": 32, "head_dim": 128}
    assert AdaptInfer(ONE).macs(**sizes) == 32 * 128 * 64 * (64 + 576)
    assert AdaptInfer(ONE, prior_window=16).macs(**sizes) == 32 * 128 * 16 * (16 + 576)
    assert FastV(ONE).macs(**sizes) == 32 * 128 * 576
