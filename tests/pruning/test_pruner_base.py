"""The contract every method inherits: identity, pools, typed errors, fingerprints."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from epd_pruning import PruningError, available, fingerprint, token_pruner
from epd_pruning.base import ImagePruner, Pool, QueryPruner, TokenPruner, VisionInputs
from epd_pruning.controls import Random, UniformStride


@dataclass(frozen=True)
class ByFirstColumn(ImagePruner):
    name: ClassVar[str] = "by_first_column"

    def rank_image(self, inputs: VisionInputs, count: int) -> Tensor:
        return inputs.embeddings[:, 0].argsort(descending=True, stable=True)


@dataclass(frozen=True)
class ByQuery(QueryPruner):
    name: ClassVar[str] = "by_query"

    @property
    def query_needs(self) -> frozenset[str]:
        return frozenset({"aligned"})

    def rank_query(self, inputs: VisionInputs, num_kept: int) -> Tensor:
        score = inputs.require("aligned") @ inputs.require("query")[0]
        return score.argsort(descending=True, stable=True)


def image(num_tokens: int = 12, **extra: Tensor) -> VisionInputs:
    generator = torch.Generator().manual_seed(num_tokens)
    return VisionInputs(embeddings=torch.randn(num_tokens, 4, generator=generator), **extra)


@pytest.mark.parametrize("num_kept", [12, 13, 100])
def test_keeping_everything_hands_back_the_tensors_given(num_kept: int) -> None:
    inputs = image(aligned=torch.randn(12, 3))
    for pruner in (ByFirstColumn(), ByQuery(), Random()):
        pool = pruner.prepare(inputs, num_kept)
        assert pool.inputs.embeddings is inputs.embeddings
        keep_indices = pruner.select(pool, num_kept, query=torch.ones(1, 3))
        assert keep_indices.tolist() == list(range(12))
        assert pool.gather(keep_indices) is inputs.embeddings


def test_no_tokens_are_no_tokens() -> None:
    pool = ByFirstColumn().prepare(image(0), 5)
    assert ByFirstColumn().select(pool, 5).shape == (0,)


def test_a_pool_holds_the_chosen_rows_and_what_the_query_stage_reads() -> None:
    inputs = image(aligned=torch.randn(12, 3), cls_attention=torch.rand(12))
    pool = ByFirstColumn().prepare(inputs, 5)
    order = inputs.embeddings[:, 0].argsort(descending=True)[:5]
    assert pool.indices.tolist() == sorted(order.tolist())
    assert torch.equal(pool.indices[pool.rank.argsort()], order)  # type: ignore[union-attr]
    assert torch.equal(pool.inputs.embeddings, inputs.embeddings[pool.indices])
    assert pool.inputs.aligned is None and pool.inputs.cls_attention is None
    assert ByQuery().prepare(inputs, 5).inputs.aligned is not None


@pytest.mark.parametrize("smaller", range(1, 8))
def test_a_larger_pool_serves_a_smaller_budget_as_a_cold_run_would(smaller: int) -> None:
    inputs = image()
    for pruner in (ByFirstColumn(), Random(seed=3)):
        pool = pruner.prepare(inputs, 8)
        assert torch.equal(pruner.select(pool, smaller), pruner.prune(inputs, smaller))


def test_an_unpruned_pool_serves_any_budget() -> None:
    pruner, inputs = ByFirstColumn(), image()
    whole = pruner.prepare(inputs, 12)
    assert torch.equal(pruner.select(whole, 4), pruner.prune(inputs, 4))


def test_gather_finds_image_positions_inside_the_pool() -> None:
    inputs = image()
    pool = ByFirstColumn().prepare(inputs, 6)
    keep_indices = ByFirstColumn().select(pool, 3)
    assert torch.equal(pool.gather(keep_indices), inputs.embeddings[keep_indices])


def refusal(pruner: TokenPruner, pool: Pool, num_kept: int) -> PruningError:
    with pytest.raises(PruningError) as caught:
        pruner.select(pool, num_kept)
    return caught.value


def test_budgets_a_pool_cannot_serve_are_refused() -> None:
    first, stride = ByFirstColumn(), UniformStride()
    assert refusal(first, first.prepare(image(), 4), 5).field == "num_kept"
    assert refusal(stride, stride.prepare(image(), 4), 3).allowed.startswith("4")
    assert refusal(first, first.prepare(image(), 4), 0).allowed == "in [1, 12]"


def test_a_missing_tensor_is_named() -> None:
    for stage in (lambda: ByQuery().prepare(image(), 4), lambda: image().require("query")):
        with pytest.raises(PruningError) as caught:
            stage()
        assert caught.value.field in {"aligned", "query"}


@pytest.mark.parametrize(
    ("field", "build"),
    [
        ("embeddings", lambda: VisionInputs(embeddings=torch.zeros(2, 3, 4))),
        ("aligned", lambda: image(aligned=torch.zeros(11, 2))),
        ("cls_attention", lambda: image(cls_attention=torch.zeros(()))),
        ("query", lambda: image(query=torch.zeros(4))),
        ("grid", lambda: VisionInputs(embeddings=torch.zeros(12, 2), grid=(3, 5))),
    ],
)
def test_malformed_inputs_name_their_field(field: str, build: object) -> None:
    with pytest.raises(PruningError) as caught:
        build()  # type: ignore[operator]
    assert caught.value.field == field


def test_unknown_methods_and_parameters_are_typed_errors() -> None:
    for name, params, field in (
        ("script9", {}, "method"),
        ("random", {"speed": 3}, "speed"),
        ("random", {"seed": "3"}, "seed"),
        ("random", {"seed": True}, "seed"),
        ("low_resolution", {"merging": 1}, "merging"),
    ):
        with pytest.raises(PruningError) as caught:
            token_pruner(name, params)
        assert caught.value.field == field
    assert token_pruner("random", {"seed": 3}) == Random(seed=3)
    assert {"random", "uniform_stride", "low_resolution"} <= set(available())


def test_every_method_is_known_by_its_own_name() -> None:
    for name in available():
        assert token_pruner(name).name == name


def test_fingerprint_follows_every_hyper_parameter() -> None:
    prints = {fingerprint(token_pruner(name)) for name in available()}
    assert len(prints) == len(available())
    assert fingerprint(Random(seed=1)) != fingerprint(Random())
    assert fingerprint(Random(seed=0)) == fingerprint(Random())


def run(code: str, hash_seed: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
        env={"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "import epd_pruning as p; print(p.fingerprint(p.token_pruner('random', {'seed': 4})))"
    assert run(code, "1") == run(code, "2") == fingerprint(Random(seed=4))


def test_the_door_of_the_room_loads_no_torch() -> None:
    assert run("import epd_pruning; print('torch' in sys.modules)", "0") == "False"
