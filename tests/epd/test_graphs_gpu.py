"""CUDA graphs of decode steps against the same kernels launched one by one; compilers at rest."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epd.config import EngineConfig
from epd.core import EngineCore, NewSequence
from epd.graphs import CalledAgain
from epd.models.context import ForwardContext
from epd.models.decoder import Decoder, DecoderConfig
from epd.request import SamplingParams
from epd.scheduler import Chunk
from epd.step_arrays import step_arrays
from epd_kernels import rms_norm
from epd_pruning import layer_pruner
from epd_pruning.schedule import Schedule

pytestmark = pytest.mark.gpu

IMAGE, SIZE = 3, 40
CONFIG = DecoderConfig(
    vocab_size=997, hidden_size=512, intermediate_size=1024, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=128, max_position=4096,
)  # fmt: skip
KINDS = [
    (None, "bf16"), ("w4a8-fp8", "int4"), ("w4a8-int8", "fp8"), ("fp8", "bf16"), ("w4a16", "int4"),
]  # fmt: skip
PRUNER = layer_pruner("adaptinfer", Schedule((0, 1), ratios=(0.5, 0.2), of="original"))


@pytest.fixture(autouse=True)
def device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


def _decoder(scheme: str | None) -> Decoder:
    decoder = Decoder.random(CONFIG, "cuda", torch.bfloat16, seed=3, scheme=scheme)
    decoder.embedding.mul_(20)
    return decoder


def _core(
    decoder: Decoder, recorder: CalledAgain | None = None, *, compiled: bool = False,
    **settings: Any,
) -> EngineCore:  # fmt: skip
    card: Any = SimpleNamespace(
        revision="r1", eos_token_ids=(2,), max_position=4096, path=Path("absent")
    )
    asked = {"num_blocks": 1200, "max_num_seqs": 6, "max_batched_tokens": 1500} | settings
    core = EngineCore(
        decoder, card, config=EngineConfig(**asked), device="cuda", recorder=recorder,
        layer_pruner=PRUNER,
    )  # fmt: skip
    core.warm_up(compiled=compiled)
    return core


def _add(core: EngineCore, name: str, length: int, *, images: int = 0, **fields: Any) -> None:
    source = random.Random(name)
    ids = [source.randrange(4, CONFIG.vocab_size) for _ in range(length)]
    ids[1 : 1 + images] = [IMAGE] * images
    generator = torch.Generator("cuda").manual_seed(length)
    vision = [
        torch.randn(SIZE, CONFIG.hidden_size, generator=generator, device="cuda").bfloat16()
        for _ in range(images)
    ]
    core.add(
        NewSequence(**{
            "request_id": name, "attempt": 0, "prompt_token_ids": ids, "image_token_id": IMAGE,
            "mm_keys": [f"{name}{i}" for i in range(images)],
            "sampling": SamplingParams(max_tokens=12, ignore_eos=True), **fields,
        }),
        vision,
    )  # fmt: skip


def _prompts(core: EngineCore) -> None:
    _add(core, "a", 7)
    _add(core, "b", 60, images=1, layer_keep=0.4)
    _add(core, "c", 1100, images=2)


def _steps(core: EngineCore, watch: Callable[[list[Chunk]], None]) -> dict[str, list[int]]:
    """The tokens of everything; `watch` sees every step before it is run."""
    real = core._runner.run
    found: dict[str, list[int]] = {}

    def run(chunks: Any) -> Any:
        watch(chunks)
        return real(chunks)

    core._runner.run = run  # type: ignore[method-assign]
    while core.has_work():
        result = core.step()
        assert not result.failed
        for token in result.tokens:
            found.setdefault(token.request_id, []).append(token.output.token_id)
    return found


@pytest.mark.parametrize(("scheme", "kv"), KINDS)
def test_a_graph_repeats_the_same_kernels_bit_for_bit(scheme: str | None, kv: str) -> None:
    decoder = _decoder(scheme)
    seen: list[list[torch.Tensor]] = []
    tokens = []
    for recorder in (None, CalledAgain("cuda")):
        core = _core(decoder, recorder, kv=kv)
        graphs, logits = core._runner.decode_graphs, list[torch.Tensor]()
        assert graphs is not None

        def watch(chunks: list[Chunk], graphs: Any = graphs, logits: Any = logits) -> None:
            if graphs.takes(chunks):
                first = graphs.run(chunks)[0].clone()
                again, best = graphs.run(chunks)
                assert torch.equal(first, again)
                assert torch.equal(best, first.argmax(-1))
                logits.append(first)

        _prompts(core)
        tokens.append(_steps(core, watch))
        seen.append(logits)
    assert tokens[0] == tokens[1]
    assert len(seen[0]) == len(seen[1]) >= 11
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize(("scheme", "kv"), KINDS)
def test_graphs_agree_with_steps_of_exact_bounds(scheme: str | None, kv: str) -> None:
    decoder = _decoder(scheme)
    core = _core(decoder, kv=kv)
    graphs, errors = core._runner.decode_graphs, []
    assert graphs is not None

    def watch(chunks: list[Chunk]) -> None:
        if not graphs.takes(chunks):
            return
        groups = core.facts.layer_group
        with torch.inference_mode():
            arrays = step_arrays(chunks, num_groups=max(groups) + 1,
                                 block_size=core.pool.block_size, steady=False)  # fmt: skip
            step = arrays.send(torch.device("cuda"))
            context = ForwardContext(groups=step.groups, layer_group=groups, kv=core.pool)
            hidden = decoder.forward(decoder.embed(step.ids), step.positions, context)
            expected = decoder.logits(hidden).clone()
        found = graphs.run(chunks)[0]
        errors.append(float((found - expected).norm() / expected.norm()))

    _prompts(core)
    _steps(core, watch)
    # bf16 with another number of spans; codes amplify a last bit into a step of the quantiser
    assert max(errors) < (2e-2 if scheme is None and kv == "bf16" else 6e-2)


@pytest.mark.parametrize(("scheme", "kv"), KINDS)
@pytest.mark.parametrize("length", [2, 100, 250, 700])
def test_a_padded_prompt_agrees_with_the_prompt(scheme: str | None, kv: str, length: int) -> None:
    core = _core(_decoder(scheme), kv=kv)
    runner, decoder = core._runner, core._runner._decoder
    graphs = runner.prompt_graphs
    assert graphs is not None
    _add(core, "a", length, images=int(length > 2))
    chunks = core._scheduler.schedule().chunks
    with torch.inference_mode():
        arrays = step_arrays(chunks, num_groups=3, block_size=core.pool.block_size, steady=True)
        step = arrays.send(torch.device("cuda"))
        expected = decoder.logits(runner._forward(chunks, step)[step.last])
        assert graphs.takes(chunks)
        found = graphs.run(arrays, runner._vision_rows(arrays.images))[0].clone()
        again, best = graphs.run(arrays, runner._vision_rows(arrays.images))
    assert torch.equal(found, again)
    assert torch.equal(best, found.argmax(-1))
    error = float((found - expected).norm() / expected.norm())
    # other tiles sum in another order, and codes amplify a last bit into a step of the quantiser
    assert error < (2e-2 if scheme is None and kv == "bf16" else 6e-2)


@pytest.mark.parametrize(("scheme", "kv"), KINDS)
def test_prompts_beside_decoding_sequences_agree_with_the_step(scheme: str | None, kv: str) -> None:
    core = _core(_decoder(scheme), kv=kv)
    runner, errors, sizes = core._runner, list[float](), set[int]()
    graphs = runner.prompt_graphs
    assert graphs is not None

    def watch(chunks: list[Chunk]) -> None:
        if len(chunks) == 1 or all(c.length == 1 for c in chunks) or not graphs.takes(chunks):
            return
        with torch.inference_mode():
            arrays = step_arrays(chunks, num_groups=3, block_size=core.pool.block_size, steady=True)
            step = arrays.send(torch.device("cuda"))
            hidden = runner._forward(chunks, step)[step.last]
            expected = runner._decoder.logits(hidden).clone()
            found = graphs.run(arrays, runner._vision_rows(arrays.images))[0].clone()
            again, best = graphs.run(arrays, runner._vision_rows(arrays.images))
        assert torch.equal(found, again)
        assert torch.equal(best, found.argmax(-1))
        errors.append(float((found - expected).norm() / expected.norm()))
        sizes.add(len(arrays.ids))

    for number, length in enumerate((3, 17, 100, 400) * 4):
        # answers of different lengths end one by one, and prompts join the others
        sampling = SamplingParams(max_tokens=3 + number % 5, ignore_eos=True)
        _add(core, f"{number}", length + number, images=number % 2, sampling=sampling)
    _steps(core, watch)
    assert len(sizes) > 1 and len(errors) > 5
    assert max(errors) < (2e-2 if scheme is None and kv == "bf16" else 6e-2)


def test_without_memory_for_graphs_the_tokens_are_the_same() -> None:
    decoder = _decoder(None)
    answers = []
    for settings in ({}, {"graph_memory_bytes": 0}, {"cuda_graphs": False}):
        core = _core(decoder, **settings)
        _prompts(core)
        answers.append(_steps(core, lambda chunks: None))
    assert answers[0] == answers[1] == answers[2]


def test_a_later_core_compiles_nothing_and_records_as_it_goes(compiled: list[str]) -> None:
    decoder = _decoder("w4a8-fp8")
    first = _core(decoder, kv="int4", prefix_cache=False)
    _prompts(first)
    expected = _steps(first, lambda chunks: None)
    compiled.clear()
    later = _core(decoder, kv="int4", prefix_cache=False, compiled=True)
    for _ in range(2):
        _prompts(later)
        assert _steps(later, lambda chunks: None) == expected
    assert compiled == []


@pytest.mark.parametrize(("scheme", "kv"), KINDS)
def test_nothing_is_compiled_after_warm_up(
    scheme: str | None, kv: str, compiled: list[str]
) -> None:
    core = _core(_decoder(scheme), kv=kv)
    compiled.clear()
    source = random.Random(5)
    for number in range(40):
        images = source.choice((0, 0, 1, 2))
        fields: dict[str, Any] = {}
        if images and source.random() < 0.5:
            fields["layer_keep"] = source.choice((0.4, 0.6))
        temperature = source.choice((0.0, 0.0, 0.7))
        sampling = SamplingParams(
            max_tokens=source.randint(1, 20), temperature=temperature, seed=number, ignore_eos=True,
            top_p=source.choice((0.5, 1.0)), top_k=source.choice((0, 7)),
            logprobs=source.choice((None, 2)),
            repetition_penalty=source.choice((1.0, 1.2)),
        )  # fmt: skip
        length = source.choice((3 + images, 30, source.randint(10, 900), 1509, 2000))
        _add(core, f"r{number}", length, images=images, sampling=sampling, **fields)
        for _ in range(source.randint(0, 6)):
            core.step()
    while core.has_work():
        assert not core.step().failed
    assert compiled == []
    width = 48 + 16 * KINDS.index((scheme, kv))  # of no model here
    rms_norm(torch.ones(1, width, device="cuda"), torch.ones(width, device="cuda"), 1e-6)
    assert len(compiled) == 1, "whoever compiles is seen"
