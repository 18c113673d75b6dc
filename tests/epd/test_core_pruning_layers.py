"""Pruning inside the decoder against an eager fp32 reference that masks instead of dropping.

The reference recomputes every layer over all tokens with explicit [L, L] attention, scores with the
whole map, and hides dropped tokens from deeper layers by a mask: it knows no cache and no gather.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from epd.models.decoder import Decoder
from epd.request import SamplingParams
from epd_pruning import available
from epd_pruning.layer_base import LayerInputs, LayerPruner


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """`x` [heads, L, d] turned by its positions."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** -(torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Eager:
    """One prompt in the reference: what it keeps after each stage, then its greedy answer."""

    def __init__(
        self, decoder: Decoder, prompt: Tensor, positions: list[int], vision: list[int],
        num_text: int, pruner: LayerPruner | None,
    ) -> None:  # fmt: skip
        self.decoder, self.pruner, self.config = decoder, pruner, decoder.config
        self.eps = decoder.config.rms_norm_eps
        self.hidden, self.positions = prompt, torch.tensor(positions)
        self.vision, self.num_text = vision, num_text
        self.num_prompt = len(prompt)
        self.kept: dict[int, list[int]] = {}

    def layer_qk(self, hidden: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        layer, theta = self.decoder.layers[index], self.config.rope.theta
        qkv = layer.attention.qkv_proj(norm(hidden, layer.input_norm.weight, self.eps))
        q, k, v = qkv.view(len(hidden), -1, self.config.head_dim).transpose(0, 1).split([4, 2, 2])
        return rotate(q, self.positions, theta), rotate(k, self.positions, theta), v

    def forward(self) -> Tensor:
        """Logits of the last token over all tokens so far; chooses what to keep the first time."""
        hidden, length = self.hidden, len(self.hidden)
        hides = torch.zeros(length, dtype=torch.bool)
        for index, layer in enumerate(self.decoder.layers):
            q, k, v = self.layer_qk(hidden, index)
            logits = q @ k.repeat_interleave(2, 0).mT * self.config.head_dim**-0.5
            masked = torch.ones(length, length, dtype=torch.bool).triu(1) | hides
            masked &= ~torch.eye(length, dtype=torch.bool)  # a hidden row is garbage, not NaN
            attention = logits.masked_fill(masked, float("-inf")).softmax(-1)
            out = (attention @ v.repeat_interleave(2, 0)).transpose(0, 1).reshape(length, -1)
            hidden = hidden + layer.attention.o_proj(out)
            x = norm(hidden, layer.post_attention_norm.weight, self.eps)
            gate, up = layer.feed_forward.gate_up_proj(x).chunk(2, -1)
            mlp = torch.nn.functional.silu(gate) * up
            hidden = hidden + layer.feed_forward.down_proj(mlp)
            if self.pruner is not None and index in self.pruner.schedule.layers:
                if index not in self.kept:
                    self.kept[index] = self.choose(index, attention, k, hidden)
                hides[list(set(self.vision) - set(self.kept[index]))] = True
        last = norm(hidden[-1], self.decoder.norm.weight, self.eps)
        head = self.decoder.embedding if self.decoder.head is None else self.decoder.head
        return last @ head.T

    def choose(self, index: int, attention: Tensor, keys: Tensor, hidden: Tensor) -> list[int]:
        """The vision tokens that stay after layer `index`, by the definition of each method."""
        assert self.pruner is not None
        stage = self.pruner.schedule.layers.index(index)
        count = self.pruner.schedule.kept(len(self.vision))[stage]
        left = next(
            (self.kept[i] for i in reversed(self.pruner.schedule.layers) if i in self.kept),
            self.vision,
        )
        text = list(range(self.num_prompt - self.num_text, self.num_prompt))
        name = self.pruner.name
        if name == "pyramiddrop":
            q, k, _ = self.layer_qk(hidden, index + 1)
            rows = [i for i in range(self.num_prompt) if i in left or i not in self.vision]
            scores = torch.einsum("hd,hld->hl", q[:, text[-1]], k.repeat_interleave(2, 0)[:, rows])
            whole = torch.zeros(len(hidden))
            whole[rows] = (scores * self.config.head_dim**-0.5).softmax(-1).mean(0)
        elif name == "fastv":
            whole = attention[:, text[-1]].mean(0)
        elif name == "sparsevlm":
            share = (self.hidden[self.vision] @ self.hidden[text].T).softmax(1).mean(0)
            raters = [row for row, s in zip(text, share, strict=True) if s > share.mean()]
            whole = attention[:, raters or text].mean((0, 1))
        elif name == "adaptinfer":
            own = attention[:, text][:, :, text]
            both = own + own.mT - torch.diag_embed(own.diagonal(dim1=1, dim2=2))
            whole = torch.einsum("hj,hjv->v", both.sum(1), attention[:, text])
        else:
            return self.choose_by_pivots(left, count, keys, hidden)
        assert count == len(left) or gap(whole[left], count) > 1e-5 * float(whole[left].max())
        best = whole[left].argsort(descending=True)[:count]
        return sorted(left[i] for i in best.tolist())

    def choose_by_pivots(
        self, left: list[int], count: int, keys: Tensor, hidden: Tensor
    ) -> list[int]:
        assert self.pruner is not None
        rows = torch.tensor(left)
        inputs = LayerInputs(
            queries=torch.zeros(4, 1, 8), keys=keys[:, : self.num_prompt], vision=rows,
            text=torch.tensor([self.num_prompt - 1]), scale=1.0, hidden=hidden,
        )  # fmt: skip
        return sorted(rows[self.pruner.order(inputs, count)[:count]].tolist())

    def answer(self, count: int) -> tuple[list[int], list[float]]:
        """Greedy tokens and their log-probabilities."""
        tokens, logprobs = [], []
        for _ in range(count):
            logits = self.forward()
            tokens.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(-1).max()))
            self.hidden = torch.cat([self.hidden, self.decoder.embedding[tokens[-1:]]])
            self.positions = torch.cat([self.positions, self.positions[-1:] + 1])
        return tokens, logprobs


def gap(scores: Tensor, count: int) -> float:
    """Distance between the worst that stays and the best that goes."""
    order = scores.sort(descending=True).values
    return float(order[count - 1] - order[count]) if 0 < count < len(order) else float("inf")


def eager_of(bench: Any, name: str, method: str | None = "adaptinfer") -> Eager:
    rows: list[Tensor] = []
    positions: list[int] = []
    vision: list[int] = []
    spare, place, length, after = iter(bench.images), 0, 0, 0
    for token in bench.tokenise(bench.cases[name][0]):
        if token == bench.image:
            chosen = bench.rows(name)
            rows.append(next(spare)[chosen])
            positions += [place + index for index in chosen]
            vision += range(length, length + len(chosen))
            length, place, after = length + len(chosen), place + bench.size, 0
        else:
            rows.append(bench.decoder.embedding[[token]])
            positions.append(place)
            length, place, after = length + 1, place + 1, after + 1
    schedule = bench.schedule(name)
    pruner = bench.pruner(method, schedule) if method and schedule else None
    return Eager(bench.decoder, torch.cat(rows), positions, vision, after, pruner)


@torch.no_grad()
def test_every_kind_of_prompt_answers_as_the_reference(layer_bench: Any):
    wanted = {name: eager_of(layer_bench, name).answer(layer_bench.new)[0]
              for name in layer_bench.cases}  # fmt: skip
    assert layer_bench.alone == wanted
    dense = eager_of(layer_bench, "one", None).answer(layer_bench.new)[0]
    assert wanted["one"] != dense == wanted["dense"]


@pytest.mark.parametrize("method", available("layer"))
@torch.no_grad()
def test_dropping_is_masking_through_34_tokens(layer_bench: Any, method: str):
    """Each method alone: tokens, log-probabilities, and the KV length of every group each step."""
    for name in ("one", "two", "gaps"):
        tokens, logprobs = eager_of(layer_bench, name, method).answer(layer_bench.new)
        core = layer_bench.core(layer_bench.pruner(method))
        sampling = SamplingParams(max_tokens=layer_bench.new, ignore_eos=True, logprobs=1)
        core.add(layer_bench.sequence(name, sampling=sampling), layer_bench.vision(name))
        outputs = []
        for result in layer_bench.steps(core):
            outputs += [token.output for token in result.tokens]
            if core.has_work():
                table = core._scheduler.sequences[name].table
                assert table.lengths == layer_bench.lengths(name, len(outputs))
                held = [len(blocks) for blocks in table.blocks]
                assert held == [-(-length // 4) for length in table.lengths]
        assert [output.token_id for output in outputs] == tokens
        assert [output.logprob for output in outputs] == pytest.approx(logprobs, abs=2e-4)
        first, second, third = layer_bench.lengths(name, 1)
        assert first > second > third
