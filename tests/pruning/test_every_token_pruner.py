"""Properties that every method before the LLM has, and the ones only some may claim."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from epd_pruning import available, token_pruner
from epd_pruning.base import TokenPruner, VisionInputs
from epd_pruning.registry import fingerprint
from epd_pruning.relevance import RelevanceOnly

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{name: (name, {}) for name in available()},
    "script-bipartite": ("script", {"graph": "bipartite"}),
    "script-intersect": ("script", {"combine": "intersect_fill"}),
    "script-plot": ("script", {"combine": "plot_parity"}),
    "script-released": ("script", {"combine": "released", "relevance_form": "raw"}),
    "script-embeds": ("script", {"query_encoder": "llm_embed_mean"}),
    "cdpruner-exp": ("cdpruner", {"relevance_form": "exp", "relevance_weight": 0.8}),
    "visionzip-merging": ("visionzip", {"merging": True}),
}
BY_CONTENT = {"cdpruner", "cdpruner-exp", "divprune", "relevance", "script",
              "script-intersect", "script-plot", "script-released", "script-embeds"}  # fmt: skip
# the blind DPP starts from a tie of all tokens, which the lowest index wins
BY_PLACE = {"dpp", "low_resolution", "random", "script-bipartite", "uniform_stride", "visionzip",
            "visionzip-merging", "vispruner"}  # fmt: skip


@pytest.fixture(params=sorted(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def build(variant: str) -> TokenPruner:
    name, params = VARIANTS[variant]
    return token_pruner(name, params)


def image(variant: str, seed: int = 0, count: int = 64, width: int = 40) -> VisionInputs:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, width, generator=generator) + 0.5
    wide = VARIANTS[variant][1].get("query_encoder") == "llm_embed_mean"
    return VisionInputs(
        embeddings=embeddings,
        encoder_states=torch.randn(count, 20, generator=generator),
        encoder_keys=torch.randn(count, 8, generator=generator),
        cls_attention=torch.rand(count, generator=generator),
        aligned=torch.randn(count, 12, generator=generator),
        query=torch.randn(1, width if wide else 12, generator=generator),
        seed=seed,
    )


@pytest.mark.parametrize("num_kept", [1, 2, 3, 7, 16, 31, 50, 63])
def test_exactly_as_many_as_asked_sorted_and_in_range(variant: str, num_kept: int) -> None:
    keep_indices = build(variant).prune(image(variant), num_kept)
    assert keep_indices.dtype == torch.int64 and keep_indices.shape == (num_kept,)
    assert bool((keep_indices.diff() > 0).all())
    assert keep_indices[0] >= 0 and keep_indices[-1] < 64


def test_keeping_everything_is_the_identity_bit_for_bit(variant: str) -> None:
    pruner, inputs = build(variant), image(variant)
    pool = pruner.prepare(inputs, 64)
    keep_indices = pruner.select(pool, 64, query=inputs.query)
    assert pool.gather(keep_indices) is inputs.embeddings


def test_two_runs_agree_and_leave_their_inputs_alone(variant: str) -> None:
    inputs = image(variant)
    before = inputs.embeddings.clone()
    first, second = build(variant).prune(inputs, 16), build(variant).prune(inputs, 16)
    assert torch.equal(first, second)
    assert torch.equal(inputs.embeddings, before)
    assert fingerprint(build(variant)) == fingerprint(build(variant))


def test_embeddings_change_only_where_merging_is_on(variant: str) -> None:
    pruner, inputs = build(variant), image(variant)
    pool = pruner.prepare(inputs, 16)
    merging = getattr(pruner, "merging", False)
    assert torch.equal(pool.inputs.embeddings, inputs.embeddings[pool.indices]) is not merging


def test_the_pool_has_the_size_announced(variant: str) -> None:
    pruner, inputs = build(variant), image(variant)
    for num_kept in (1, 9, 40, 63):
        pool = pruner.prepare(inputs, num_kept)
        assert len(pool) == pruner.pool_size(64, num_kept) >= num_kept
        assert set(pruner.select(pool, num_kept, query=inputs.query).tolist()) <= set(
            pool.indices.tolist()
        )


@pytest.mark.parametrize("name", sorted(name for name in VARIANTS if build(name).prefix))
def test_a_larger_pool_gives_what_a_cold_run_gives_where_promised(name: str) -> None:
    pruner, inputs = build(name), image(name)
    pool = pruner.prepare(inputs, 30)
    for num_kept in (1, 5, 12, 30):
        kept = pruner.select(pool, num_kept, query=inputs.query)
        assert torch.equal(kept, pruner.prune(inputs, num_kept))


def test_neighbours_in_a_batch_change_nothing(variant: str) -> None:
    pruner, counts = build(variant), [16, 16, 9, 20]
    images = [image(variant, seed, size) for seed, size in enumerate((64, 64, 36, 64))]
    alone = [pruner.prune(inputs, k) for inputs, k in zip(images, counts, strict=True)]
    pools = pruner.prepare_all(images, counts)
    chosen = pruner.select_all(pools, counts, queries=[inputs.query for inputs in images])
    assert all(torch.equal(one, other) for one, other in zip(alone, chosen, strict=True))


def follows_a_permutation(variant: str, seed: int) -> bool:
    pruner, inputs = build(variant), image(variant, seed)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    moved = pruner.prune(inputs.take(order), 16)
    return torch.equal(order[moved].sort().values, pruner.prune(inputs, 16))


def test_content_methods_follow_a_permutation_of_the_tokens() -> None:
    for variant in sorted(BY_CONTENT):
        assert all(follows_a_permutation(variant, seed) for seed in range(3)), variant


def test_place_methods_do_not() -> None:
    for variant in sorted(BY_PLACE):
        assert not all(follows_a_permutation(variant, seed) for seed in range(3)), variant


def test_scaling_the_embeddings_changes_no_choice(variant: str) -> None:
    inputs = image(variant)
    scaled = replace(inputs, embeddings=inputs.embeddings * 8)
    assert torch.equal(build(variant).prune(scaled, 16), build(variant).prune(inputs, 16))


def rounded(x: torch.Tensor, code: str) -> torch.Tensor:
    """`x` as it comes back from 16 bits, or from 8 with a scale per row."""
    if code in ("bfloat16", "float16"):
        return x.to(getattr(torch, code))
    scale = x.abs().amax(-1, keepdim=True) / (448 if code == "float8_e4m3fn" else 127)
    codes = x / scale
    codes = codes.round() if code == "int8" else codes.to(torch.float8_e4m3fn).float()
    return codes * scale


@pytest.mark.parametrize(
    ("code", "least"),
    [("float16", 0.99), ("bfloat16", 0.85), ("int8", 0.9), ("float8_e4m3fn", 0.75)],
)
def test_rounded_embeddings_change_few_choices(variant: str, code: str, least: float) -> None:
    """The mean Jaccard index of the tokens kept with those of fp32 embeddings."""
    pruner, overlap = build(variant), 0.0
    for seed in range(6):
        inputs = image(variant, seed)
        coarse = replace(inputs, embeddings=rounded(inputs.embeddings, code))
        one, other = (set(pruner.prune(i, 16).tolist()) for i in (inputs, coarse))
        overlap += len(one & other) / len(one | other) / 6
    assert overlap >= least


@pytest.mark.parametrize("code", ["int8", "float8_e4m3fn"])
def test_rounding_flips_only_what_scores_like_the_last_one_kept(code: str) -> None:
    pruner, flips = RelevanceOnly(), 0
    for seed in range(30):
        inputs = image("relevance", seed, 576)
        assert inputs.aligned is not None
        coarse = replace(inputs, aligned=rounded(inputs.aligned, code).float())
        one, other = (set(pruner.prune(i, 64).tolist()) for i in (inputs, coarse))
        exact, near = pruner.relevance(inputs), pruner.relevance(coarse)
        last, error = exact.topk(64).values[-1], (exact - near).abs().max()
        for flipped in one ^ other:
            assert abs(exact[flipped] - last) <= 2 * error + 1e-6
        flips += len(one ^ other)
    assert flips > 0


def test_missing_tensors_are_named(variant: str) -> None:
    pruner = build(variant)
    for need in pruner.image_needs | pruner.query_needs:
        with pytest.raises(ValueError, match=f"^{need} must be given"):
            pruner.prune(replace(image(variant), **{need: None}), 8)


def test_one_token_is_the_best_single_one() -> None:
    inputs = image("cdpruner")
    for name in ("cdpruner", "relevance"):
        pruner = token_pruner(name)
        assert pruner.prune(inputs, 1).item() == pruner.relevance(inputs).argmax()  # type: ignore[attr-defined]


def test_selection_cost_grows_with_what_is_compared() -> None:
    script, cdpruner = token_pruner("script", {"pool_floor": 0.0}), token_pruner("cdpruner")
    assert cdpruner.macs(576, 64, 4096) == 576**2 * 4096 + 576 * 64**2
    assert script.macs(576, 64, 4096) == 576**2 * 4096 + 128**2 * 4096 + 128 * 64**2
    assert token_pruner("random").macs(576, 64, 4096) == 0
