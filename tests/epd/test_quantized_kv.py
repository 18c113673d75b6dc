"""The engine on coded KV: the same tokens however a prompt is cut, cached, evicted or moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from epd.config import EngineConfig
from epd.core import EngineCore, NewSequence
from epd.errors import CheckpointError, ConfigError, WireError
from epd.kv import gate
from epd.kv.handoff import KVHandoff
from epd.kv.pool import KVPool
from epd.models.card import ModelCard
from epd.models.context import AttentionBatch, ForwardContext, Tap
from epd.models.decoder import Decoder
from epd.models.layers import DecoderLayer
from epd.models.rope import rope_angles
from epd.models.tiny import write_tiny_llava
from epd.request import SamplingParams
from epd_kernels import KVFormat, dequantize_kv, quantize_kv

NUM_TOKENS = 20
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"tied": True}, "qk-norm": {"text": "qwen3", "num_heads": 6, "num_kv_heads": 3},
}  # fmt: skip
FORMATS = pytest.mark.parametrize("kv", ["int4", "fp8"])


@dataclass
class Model:
    """A tiny checkpoint whose keys are smoothed by factors that are not one."""

    card: ModelCard
    decoder: Decoder
    vision: list[torch.Tensor]

    def core(self, kv: str, **settings: Any) -> EngineCore:
        """Poisoned: whoever reads a slot that nobody wrote answers nonsense."""
        config = EngineConfig(**{"block_size": 4, "num_blocks": 300, "kv": kv, **settings})
        core = EngineCore(self.decoder, self.card, config=config, device="cpu")
        core.pool.fill(float("nan"))
        return core


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = write_tiny_llava(tmp_path_factory.mktemp("llava"), seed=4, **SHAPES[request.param])
    card = ModelCard.load(path)
    decoder = Decoder.load(card, "cpu", torch.float32)
    rng = torch.Generator().manual_seed(1)
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        shape = (decoder.config.num_kv_heads, decoder.config.head_dim)
        layer.attention.kv_factors = torch.rand(shape, generator=rng) + 0.5
    vision = list(torch.randn(3, 16, decoder.config.hidden_size, generator=rng))
    return Model(card, decoder, vision)


def requests(model: Model, **fields: Any) -> Iterator[tuple[NewSequence, list[torch.Tensor]]]:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    texts = (("how many sides?", []), ("@what is it?", [0]), ("@what is this?", [0]),
             ("first @ then @", [0, 1]), ("@@ and @ again", [2, 1, 2]))  # fmt: skip
    for name, (text, pictures) in enumerate(texts):
        prompt = [1, *(4 if c == "@" else 5 + ord(c) for c in text)]
        yield NewSequence(
            **{
                "request_id": str(name), "attempt": 0, "prompt_token_ids": prompt,
                "image_token_id": 4, "mm_keys": [f"pixels{i}" for i in pictures],
                "sampling": sampling, **fields,
            }
        ), [model.vision[i] for i in pictures]  # fmt: skip


def run(core: EngineCore, model: Model, **fields: Any) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    for sequence, vision in requests(model, **fields):
        answers[sequence.request_id] = []
        core.add(sequence, vision)
    while core.has_work():
        result = core.step()
        assert not result.failed
        for token in result.tokens:
            answers[token.request_id].append(token.output.token_id)
        core.check()
    return answers


@pytest.fixture(scope="module")
def expected(model: Model) -> Callable[[str], dict[str, list[int]]]:
    """Every prompt whole, alone and cold."""
    made: dict[str, dict[str, list[int]]] = {}

    def get(kv: str) -> dict[str, list[int]]:
        if kv not in made:
            made[kv] = run(model.core(kv, prefix_cache=False, max_num_seqs=1), model)
        return made[kv]

    return get


@FORMATS
def test_cut_cached_and_evicted_prompts_answer_alike(model: Model, expected: Any, kv: str):
    whole = expected(kv)
    assert len({tuple(answer) for answer in whole.values()}) == len(whole)
    assert run(model.core(kv), model) == whole
    assert run(model.core(kv, max_batched_tokens=7), model) == whole
    warm = model.core(kv, max_batched_tokens=16)
    assert run(warm, model) == whole
    assert run(warm, model) == whole
    assert warm.stats().prefix_hits > 0
    tight = model.core(kv, num_blocks=24, prefix_cache=False)
    assert run(tight, model) == whole
    assert tight.stats().preemptions > 0


@FORMATS
def test_handed_over_kv_answers_alike(model: Model, expected: Any, kv: str):
    """The bytes that arrive are the bytes that were sent: nothing is coded anew."""
    prefill, decode = model.core(kv, max_batched_tokens=11), model.core(kv, block_size=8)
    answers: dict[str, list[int]] = {}
    for sequence, vision in requests(model, handoff=True):
        answers[sequence.request_id] = []
        prefill.add(sequence, vision)
    while prefill.has_work() or decode.has_work():
        result = prefill.step()
        for token in [*result.tokens, *decode.step().tokens]:
            answers[token.request_id].append(token.output.token_id)
        for name in result.handoffs:
            data = msgspec.msgpack.encode(prefill.offer(name))
            handoff = msgspec.msgpack.decode(data, type=KVHandoff)
            tensors = prefill.export_kv(name)
            assert all(tensor.dtype == torch.uint8 for tensor in tensors)
            assert [tuple(t.shape) for t in tensors] == [
                handoff.shape(i) for i in range(len(tensors))
            ]
            assert decode.reserve(handoff, 0, None)
            decode.import_kv(name, tensors)
            again = decode.pool.gather(*_place(decode, name))
            assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True))
            prefill.release(name)
    assert answers == expected(kv)


def _place(core: EngineCore, name: str) -> tuple[list[int], int]:
    table = core._scheduler.sequences[name].table
    assert table is not None
    return table.blocks[0], table.lengths[0]


def test_formats_do_not_mix(model: Model):
    """A worker refuses KV held in another way before it sets anything aside."""
    source = model.core("int4")
    sequence, vision = next(requests(model, handoff=True))
    source.add(sequence, vision)
    while not source.step().handoffs:
        pass
    for kv in ("fp8", "bf16"):
        with pytest.raises(WireError, match="kv_formats"):
            model.core(kv).reserve(source.offer("0"), 0, None)
    target = model.core("int4")
    assert target.reserve(source.offer("0"), 0, None)
    with pytest.raises(WireError, match="shape or dtype"):
        target.import_kv("0", [t.view(torch.int8) for t in source.export_kv("0")])


@FORMATS
def test_a_layer_computes_attention_over_what_codes_mean(model: Model, kv: str):
    """The decoder on a coded pool against its own layers on widened keys and values."""
    decoder, length = model.decoder, 21
    config = decoder.config
    hidden = torch.randn(length, config.hidden_size, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(length)
    pool = KVPool(
        config.num_layers, num_blocks=4, block_size=8, num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim, dtype=torch.float32, device="cpu",
        formats=(kv,) * config.num_layers,
    )  # fmt: skip
    pool.fill(float("nan"))
    ends = torch.tensor([0, length], dtype=torch.int32)
    batch = AttentionBatch(
        cu_seqlens_q=ends, seq_lens=ends[1:], block_tables=torch.tensor([[2, 0, 3]]).int(),
        slot_mapping=torch.tensor([2, 0, 3])[positions // 8] * 8 + positions % 8,
        max_seqlen_q=length, max_seqlen_k=length,
    )  # fmt: skip
    tap = Tap(0)
    context = ForwardContext(
        groups=(batch,), layer_group=(0,) * config.num_layers, kv=pool, tap=tap
    )
    found = decoder.forward(hidden, positions, context)
    cos, sin = rope_angles(positions, decoder.inverse_frequency, torch.float32)
    delta, residual = None, hidden
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        x, residual = layer.enter(delta, residual)
        q, k, v = layer.attention.project(x, cos, sin)
        if index == 0:
            torch.testing.assert_close(tap.queries, q)
            torch.testing.assert_close(tap.keys, k)
        factors = layer.attention.kv_factors
        assert factors is not None
        k = dequantize_kv(quantize_kv(k * factors, KVFormat(kv))) / factors
        v = dequantize_kv(quantize_kv(v, KVFormat(kv)))
        out = functional.scaled_dot_product_attention(
            *(t.transpose(0, 1) for t in (q, k, v)), is_causal=True, enable_gqa=True
        )
        x = layer.attention.o_proj(out.transpose(0, 1).flatten(1))
        x, residual = layer.post_attention_norm.after_add(x, residual)
        delta = layer.feed_forward(x)
    assert delta is not None
    torch.testing.assert_close(
        found, decoder.norm.after_add(delta, residual)[0], rtol=1e-3, atol=1e-3
    )


def test_a_pool_may_hold_each_layer_in_its_own_way():
    shape: dict[str, Any] = {"block_size": 4, "num_kv_heads": 2, "head_dim": 8}
    kinds = ("bf16", "int4", "fp8")
    pool = KVPool(3, num_blocks=5, dtype=torch.bfloat16, device="cpu", formats=kinds, **shape)
    pool.fill(float("nan"))
    rows = 2 * 5 * 4 * 2
    assert pool.bytes() == rows * (8 * 2) + rows * (4 + 4) + rows * (8 + 4)
    assert pool.bytes() == 5 * KVPool.block_bytes(3, dtype=torch.bfloat16, formats=kinds, **shape)
    assert all(bool(cache.scales.isnan().all()) for i in (1, 2) for cache in pool.layer(i))
    moved = [torch.randn(2, 6, 2, 8).bfloat16(),
             torch.randint(256, (2, 6, 2, 8), dtype=torch.uint8),
             torch.randint(256, (2, 6, 2, 12), dtype=torch.uint8)]  # fmt: skip
    pool.scatter([3, 1], moved)
    assert all(torch.equal(a, b) for a, b in zip(pool.gather([3, 1], 6), moved, strict=True))
    assert [pool.fits(i, tensor, 6) for i, tensor in enumerate(moved)] == [True] * 3
    assert not pool.fits(1, moved[2], 6)
    assert not pool.fits(0, moved[0].float(), 6)
    codes, scales = pool.layer(1)[0]
    for position in range(6):
        at = [3, 1][position // 4], position % 4
        assert torch.equal(codes[at], moved[1][0, position, :, :4])
        scale = scales[at].contiguous().view(torch.uint8).view(2, 4)
        assert torch.equal(scale, moved[1][0, position, :, 4:])


def test_outlying_keys_make_their_layer_fall_back(model: Model):
    """One pair of large channels drowns the others in four bits."""
    decoder = Decoder.load(model.card, "cpu", torch.float32)
    layer = decoder.layers[1]
    assert isinstance(layer, DecoderLayer)
    attention = layer.attention
    if attention.k_norm is not None:
        attention.k_norm.weight[:2] *= 300
    else:
        q_rows = attention.heads[0] * attention.head_dim
        attention.qkv_proj.weight[q_rows : q_rows + 2] *= 300  # type: ignore[index]
    config = EngineConfig(num_blocks=8, kv="int4")
    core = EngineCore(decoder, model.card, config=config, device="cpu")
    given = [check.given for check in core.kv_checks]
    assert given[0] == "int4" and given[1] != "int4"
    assert core.facts.kv_formats == core.pool.formats == tuple(given)
    assert core.stats().kv_fallbacks == 1
    assert core.kv_checks[1].error > gate.LIMIT > core.kv_checks[0].error


def test_the_check_falls_through_to_plain_kv(model: Model):
    hidden = torch.randn(40, model.decoder.config.hidden_size)
    checks = gate.check_layers(model.decoder, hidden, "int4", limit=0.0)
    assert {check.given for check in checks} == {"bf16"}
    assert all(check.fell_back and check.error > 0 for check in checks)
    (loose, *_) = gate.check_layers(model.decoder, hidden, "fp8", limit=1.0)
    assert not loose.fell_back


def test_unknown_settings_and_damaged_samples_are_refused(model: Model):
    with pytest.raises(ConfigError, match="auto, bf16, fp8, int4"):
        model.core("int3")
    file = Path(model.card.path) / gate.SAMPLE_FILE
    for content, reason in ((b"no tensors", "damaged"), (None, "holds")):
        if content is None:
            save_file({"hidden": torch.zeros(3, 5)}, file)
        else:
            file.write_bytes(content)
        with pytest.raises(CheckpointError, match=reason):
            model.core("int4")
        model.core("bf16")
        file.unlink()
