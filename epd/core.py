"""The engine core: sequences in, tokens out, one step at a time, all in one thread.

A sequence arrives either by `add`, with its vision tokens, and is prefilled here; or by `reserve`
and `import_kv`, with KV that another core computed (`offer`, `export_kv`, `release`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import structlog

from epd.errors import DeadlineError, EPDError, InvalidRequestError, WireError
from epd.graphs import default_recorder
from epd.intake import take_in
from epd.kv.blocks import BlockManager
from epd.kv.gate import choose_formats
from epd.kv.handoff import KVHandoff, ModelFacts
from epd.kv.pool import KVPool
from epd.models.layer_pruning import check_layer_pruner, resolve_layer_pruner
from epd.request import FinishReason
from epd.runner import ModelRunner
from epd.scheduler import Chunk, Scheduler
from epd.sequence import Sequence, SequenceState, prefill_done, sequence_failure
from epd.step import (
    CoreStats,
    KeptTokens,
    NewSequence,
    PrefillDone,
    SequenceFailure,
    SequenceToken,
    StepResult,
)
from epd.warm_up import warm_up

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    import torch

    from epd.config import EngineConfig
    from epd.graphs import Recorder
    from epd.models.card import ModelCard
    from epd.models.decoder import Decoder
    from epd.request import TokenOutput
    from epd_pruning.layer_base import LayerPruner

__all__ = [
    "CoreStats",
    "EngineCore",
    "KeptTokens",
    "NewSequence",
    "PrefillDone",
    "SequenceFailure",
    "SequenceToken",
    "StepResult",
]

_log = structlog.get_logger("epd.core")


class EngineCore:
    """Continuous batching of one decoder over a paged KV cache.

    `layer_pruner`, or the one that `config.layer_pruning` names, prunes inside the decoder for
    requests that ask for it; its layers say where layer groups end. `ConfigError` if it cannot.
    `recorder` repeats decode steps, on a GPU by default as CUDA graphs. Call `warm_up` before use.
    """

    def __init__(
        self,
        decoder: Decoder,
        card: ModelCard,
        *,
        config: EngineConfig,
        device: torch.device | str,
        clock: Callable[[], float] = time.monotonic,
        layer_group: tuple[int, ...] | None = None,
        layer_pruner: LayerPruner | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        shape = decoder.config
        layers = shape.num_layers
        if layer_pruner is not None:
            check_layer_pruner(layer_pruner, layers)
        elif config.layer_pruning is not None:
            layer_pruner = resolve_layer_pruner(config.layer_pruning, card.path, layers)
        if layer_pruner is not None:
            layer_group = layer_pruner.schedule.layer_groups(layers)
        groups = layer_group if layer_group is not None else (0,) * layers
        self.layer_pruner = layer_pruner
        self._card = card
        self._hidden_size = shape.hidden_size
        formats, self.kv_checks = choose_formats(decoder, card, config.kv)
        self.facts = ModelFacts(
            revision=card.revision, num_layers=layers, num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim, dtype=str(decoder.dtype).removeprefix("torch."),
            vocab_size=shape.vocab_size, max_position=card.max_position, layer_group=groups,
            kv_formats=formats,
        )  # fmt: skip
        sizes: dict[str, Any] = {
            "block_size": config.block_size, "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim, "dtype": decoder.dtype, "formats": formats,
        }  # fmt: skip
        block_bytes = KVPool.block_bytes(layers, **sizes)
        num_blocks = config.num_blocks or max(1, config.kv_memory_bytes // block_bytes)
        self.pool = KVPool(layers, num_blocks=num_blocks, device=device, **sizes)
        self.blocks = BlockManager(
            num_blocks, config.block_size, num_groups=self.facts.num_groups,
            prefix_cache=config.prefix_cache,
        )  # fmt: skip
        self._scheduler = Scheduler(
            config, self.blocks, max_model_len=card.max_position, clock=clock
        )
        recorder = recorder or default_recorder(device, graphs=config.cuda_graphs)
        self._runner = ModelRunner(
            decoder, self.pool, layer_group=groups, device=device, layer_pruner=layer_pruner
        )
        if recorder is not None:
            self._runner.repeat_with(recorder, config, max_model_len=self.max_model_len)
        self._config = config
        self._clock = clock

    def warm_up(self, *, compiled: bool = False) -> None:
        """Compile and record what steps need; nothing on a CPU. No request may be here yet.

        `compiled`: a core of the same model and sizes was warmed up in this process before.
        """
        warm_up(self._runner, self._config, self.facts, self.layer_pruner, compiled=compiled)

    @property
    def max_model_len(self) -> int:
        """Prompt and output tokens that fit: the model's context, the settings and the KV pool."""
        return self._scheduler.max_model_len

    def add(self, sequence: NewSequence, vision_tokens: Seq[torch.Tensor]) -> None:
        """Queue a request with one [tokens, hidden] tensor per image.

        Raises `InvalidRequestError` if it can never run.
        """
        for tokens in vision_tokens:
            if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] != self._hidden_size:
                raise InvalidRequestError("vision tokens do not have the decoder's hidden size")
        lengths = [len(tokens) for tokens in vision_tokens]
        layers = self.layer_pruner.schedule if self.layer_pruner is not None else None
        self._scheduler.add(take_in(sequence, lengths, self.facts, layers=layers))
        self._runner.hold_vision(sequence.request_id, vision_tokens)

    def cancel(self, request_id: str) -> None:
        """Forget a request in any state and free what it owns; idempotent."""
        sequence = self._scheduler.sequences.get(request_id)
        if sequence is not None:
            self._remove(sequence)

    def has_work(self) -> bool:
        """Whether a step may bring something: a sequence waits or runs."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    def step(self) -> StepResult:
        """Compute one batch. A request that fails, fails alone."""
        plan = self._scheduler.schedule()
        result = StepResult(num_tokens=plan.num_tokens)
        for sequence in plan.expired:
            error = DeadlineError("the deadline passed before the request could start")
            self._runner.drop_vision(sequence.request_id)
            result.failed.append(sequence_failure(sequence, error))
        result.evicted += [sequence.request_id for sequence in plan.evicted]
        for chunk, outcome in self._run(plan.chunks):
            if isinstance(outcome, Exception):
                self._fail(chunk.sequence, outcome, result)
            else:
                self._settle(chunk, outcome, result)
        return result

    def offer(self, request_id: str) -> KVHandoff:
        """What a decode worker needs to continue a held request. `KeyError` if it is not held."""
        sequence = self._held(request_id)
        assert sequence.table is not None
        return KVHandoff(
            request_id=request_id, prompt_token_ids=sequence.tokens[: sequence.num_prompt],
            output_token_ids=sequence.output_token_ids, sampling=sequence.sampling,
            kv_lengths=list(sequence.table.lengths), next_pos=sequence.next_pos,
            revision=self.facts.revision, num_layers=self.facts.num_layers,
            num_kv_heads=self.facts.num_kv_heads, head_dim=self.facts.head_dim,
            dtype=self.facts.dtype, layer_group=list(self.facts.layer_group),
            kv_formats=list(self.facts.kv_formats),
        )  # fmt: skip

    def hold(self, request_id: str) -> tuple[KVHandoff, float | None]:
        """A decoding request, stopped between two steps: what a peer needs, and its deadline.

        It is held as a prefilled one is. `KeyError` unless its KV is whole and it decodes here.
        """
        sequence = self._scheduler.sequences[request_id]
        decodes = sequence.state is SequenceState.RUNNING and sequence.prefilled
        if not decodes or sequence.num_remaining != 1:
            raise KeyError(request_id)
        self._scheduler.hold(sequence)
        self._runner.drop_vision(request_id)
        return self.offer(request_id), sequence.deadline

    def find(self, wanted: Callable[[Sequence], bool]) -> list[tuple[str, int]]:
        """Request id and attempt of the sequences that are `wanted`."""
        sequences = self._scheduler.sequences.values()
        return [(s.request_id, s.attempt) for s in sequences if wanted(s)]

    def export_kv(self, request_id: str) -> list[torch.Tensor]:
        """The KV of a held request, per layer [2, KV length, num_kv_heads, width].

        Raises `KeyError` if the request is not held.
        """
        table = self._held(request_id).table
        assert table is not None
        return [
            self.pool.gather(table.blocks[group], table.lengths[group], layers=[layer])[0]
            for layer, group in enumerate(self.facts.layer_group)
        ]

    def release(self, request_id: str) -> None:
        """Free the KV of a held request; idempotent, and nothing to a request that is not held."""
        sequence = self._scheduler.sequences.get(request_id)
        if sequence is not None and sequence.state is SequenceState.HELD:
            self._remove(sequence)

    def reserve(self, handoff: KVHandoff, attempt: int, deadline: float | None) -> bool:
        """Whether blocks were set aside for KV that will arrive; False: no room now, ask again.

        Raises `WireError` if the handoff does not fit this model, `InvalidRequestError` if it is
        too long for this core.
        """
        handoff.validate(self.facts)
        tokens = handoff.prompt_token_ids + handoff.output_token_ids
        sequence = Sequence(
            request_id=handoff.request_id, attempt=attempt, tokens=tokens,
            num_prompt=len(handoff.prompt_token_ids), sampling=handoff.sampling,
            deadline=deadline, adopted=True, prefilled=True, num_computed=len(tokens) - 1,
            next_pos=handoff.next_pos, shift=handoff.next_pos - (len(tokens) - 1),
        )  # fmt: skip
        return self._scheduler.adopt(sequence, handoff.kv_lengths)

    def import_kv(self, request_id: str, tensors: Seq[torch.Tensor]) -> None:
        """Write the KV of a reserved request, one tensor per layer, and let it decode.

        Raises `KeyError` if nothing is reserved for it, `WireError` if shapes or dtypes differ.
        """
        sequence = self._scheduler.sequences[request_id]
        if sequence.state is not SequenceState.RESERVED:
            raise KeyError(request_id)
        table, facts = sequence.table, self.facts
        assert table is not None
        if len(tensors) != facts.num_layers:
            raise WireError("imported KV has the wrong number of layers")
        for layer, (tensor, group) in enumerate(zip(tensors, facts.layer_group, strict=True)):
            if not self.pool.fits(layer, tensor, table.lengths[group]):
                raise WireError("imported KV has the wrong shape or dtype")
        for layer, (tensor, group) in enumerate(zip(tensors, facts.layer_group, strict=True)):
            self.pool.scatter(table.blocks[group], [tensor], layers=[layer])
        self._scheduler.resume(sequence)

    def stats(self) -> CoreStats:
        """Counts as of now."""
        scheduler = self._scheduler
        states = [sequence.state for sequence in scheduler.sequences.values()]
        return CoreStats(
            waiting=len(scheduler.waiting), running=len(scheduler.running),
            reserved=states.count(SequenceState.RESERVED), held=states.count(SequenceState.HELD),
            blocks_total=self.blocks.num_blocks, blocks_free=self.blocks.num_free,
            prefix_hits=scheduler.prefix_hits, prefix_queries=scheduler.prefix_queries,
            preemptions=scheduler.preemptions,
            kv_fallbacks=sum(check.fell_back for check in self.kv_checks),
        )  # fmt: skip

    def check(self) -> None:
        """Raise `AssertionError` if any block is lost, shared wrongly or freed twice."""
        tables = [sequence.table for sequence in self._scheduler.sequences.values()]
        self.blocks.check(table for table in tables if table is not None)

    def _held(self, request_id: str) -> Sequence:
        sequence = self._scheduler.sequences[request_id]
        if sequence.state is not SequenceState.HELD:
            raise KeyError(request_id)
        return sequence

    def _run(self, chunks: list[Chunk]) -> list[tuple[Chunk, TokenOutput | Exception | None]]:
        """Each chunk with what came of it. A batch that raises is repeated one by one."""
        if not chunks:
            return []
        try:
            outputs = iter(self._runner.run(chunks))
            return [(chunk, _finite(next(outputs)) if chunk.samples else None) for chunk in chunks]
        except Exception as error:
            if len(chunks) == 1:
                return [(chunks[0], error)]
            _log.warning("batch failed", size=len(chunks), error=type(error).__name__)
            return [pair for chunk in chunks for pair in self._run([chunk])]

    def _settle(self, chunk: Chunk, output: TokenOutput | None, result: StepResult) -> None:
        """Advance a sequence, append its new token, and end or hold it where that is due."""
        sequence = chunk.sequence
        self._scheduler.advance(chunk)
        if output is None:
            return
        sequence.tokens.append(output.token_id)
        if not sequence.prefilled:
            sequence.prefilled = True
            result.prefilled.append(prefill_done(sequence, self._clock()))
        reason = self._finish_reason(sequence)
        token = SequenceToken(sequence.request_id, sequence.attempt, output, reason)
        result.tokens.append(token)
        if reason is not None:
            self._remove(sequence)
        elif sequence.handoff:
            self._scheduler.hold(sequence)
            self._runner.drop_vision(sequence.request_id)
            result.handoffs.append(sequence.request_id)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        sampling, token = sequence.sampling, sequence.tokens[-1]
        if token in sampling.stop_token_ids:
            return FinishReason.STOP
        if not sampling.ignore_eos and token in self._card.eos_token_ids:
            return FinishReason.STOP
        if sequence.num_output >= sampling.max_tokens:
            return FinishReason.LENGTH
        full = len(sequence.tokens) >= self.max_model_len
        return FinishReason.LENGTH if full or sequence.end_pos >= self.facts.max_position else None

    def _fail(self, sequence: Sequence, error: Exception, result: StepResult) -> None:
        _log.error("failed", request_id=sequence.request_id, error=type(error).__name__)
        self._remove(sequence, forget=True)
        result.failed.append(sequence_failure(sequence, error))

    def _remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        self._scheduler.remove(sequence, forget=forget)
        self._runner.drop_vision(sequence.request_id)


def _finite(output: TokenOutput | None) -> TokenOutput | Exception:
    return EPDError("the model gave no finite prediction") if output is None else output
