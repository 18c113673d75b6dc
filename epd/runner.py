"""One step on tensors: chunks in, sampled tokens out. Knows no queue.

What a step tells the device is one transfer; nothing is read back but the sampled ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from epd.decode_graphs import DecodeGraphs
from epd.layer_stages import LayerStages
from epd.models.context import ForwardContext
from epd.prompt_graphs import PromptGraphs
from epd.request import TokenOutput
from epd.sampler import SampleRow, sample
from epd.step_arrays import ImageRows, StepTensors, step_arrays
from epd_kernels.embed_tokens import embed_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from epd.config import EngineConfig
    from epd.graphs import Recorder
    from epd.kv.pool import KVPool
    from epd.models.decoder import Decoder
    from epd.scheduler import Chunk
    from epd_pruning.layer_base import LayerPruner

__all__ = ["ModelRunner"]


class ModelRunner:
    """Runs chunks through the decoder. Holds the vision tokens of requests that may need them.

    With `repeat_with` steps in which everybody decodes, and those of few tokens, are repeated
    recordings. The bounds of the others are rounded up, so that all need the same compiled kernels.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        *,
        layer_group: tuple[int, ...],
        device: torch.device | str,
        layer_pruner: LayerPruner | None = None,
    ) -> None:
        self._decoder = decoder
        self._stages = LayerStages(decoder, layer_pruner) if layer_pruner is not None else None
        self._pool = pool
        self._layer_group = layer_group
        self._device = torch.device(device)
        self.decode_graphs: DecodeGraphs | None = None
        self.prompt_graphs: PromptGraphs | None = None
        self._vision: dict[str, list[torch.Tensor]] = {}

    def repeat_with(self, recorder: Recorder, config: EngineConfig, *, max_model_len: int) -> None:
        """Make what `epd.warm_up` records."""
        self.decode_graphs = DecodeGraphs(
            self._decoder, self._pool, recorder, layer_group=self._layer_group,
            max_num_seqs=config.max_num_seqs, max_model_len=max_model_len,
        )  # fmt: skip
        if config.cuda_graphs:
            self.prompt_graphs = PromptGraphs(
                self._decoder, self._pool, recorder, layer_group=self._layer_group,
                max_tokens=config.max_batched_tokens, max_num_seqs=config.max_num_seqs,
                max_model_len=max_model_len,
            )  # fmt: skip

    @property
    def hidden_size(self) -> int:
        """Width of a vision token."""
        return self._decoder.config.hidden_size

    def hold_vision(self, request_id: str, tokens: Sequence[torch.Tensor]) -> None:
        """Keep the vision tokens of a request, one [tokens, hidden] per image."""
        if tokens:
            kind = self._decoder.dtype
            self._vision[request_id] = [image.to(self._device, kind) for image in tokens]

    def drop_vision(self, request_id: str) -> None:
        """Forget them; idempotent."""
        self._vision.pop(request_id, None)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> list[TokenOutput | None]:
        """The next token of each chunk that samples, in order; None where logits are not finite.

        Idempotent until the chunks are advanced: the same slots are written with the same values.
        """
        if self.decode_graphs is not None and self.decode_graphs.takes(chunks):
            logits, best = self.decode_graphs.run(chunks)
            return sample(logits, _sample_rows(chunks), best=best)
        arrays = step_arrays(
            chunks, num_groups=max(self._layer_group) + 1, block_size=self._pool.block_size,
            steady=self.decode_graphs is not None and self.decode_graphs.ready,
        )  # fmt: skip
        if self.prompt_graphs is not None and self.prompt_graphs.takes(chunks):
            logits, best = self.prompt_graphs.run(arrays, self._vision_rows(arrays.images))
            rows = _sample_rows(chunks)
            return sample(logits, rows, best=best) if rows else []
        step = arrays.send(self._device)
        hidden = self._forward(chunks, step)
        if not len(step.last):
            return []
        if len(step.last) < len(hidden):
            hidden = hidden[step.last]
        return sample(self._decoder.logits(hidden), _sample_rows(chunks))

    def _forward(self, chunks: Sequence[Chunk], step: StepTensors) -> torch.Tensor:
        """Normed hidden states of the rows that reach the end."""
        hidden = self._embed(step)
        context = ForwardContext(groups=step.groups, layer_group=self._layer_group, kv=self._pool)
        if self._stages is not None and any(chunk.dropped for chunk in chunks):
            return self._stages.forward(hidden, step.positions, context, chunks)
        return self._decoder.forward(hidden, step.positions, context)

    def _embed(self, step: StepTensors) -> torch.Tensor:
        """Decoder inputs [T, hidden]: token embeddings, vision tokens where an image stands."""
        if not step.images:
            return self._decoder.embed(step.ids)
        vision = torch.cat(self._vision_rows(step.images))
        return embed_tokens(step.ids, self._decoder.embedding, vision, step.sources)

    def _vision_rows(self, images: Sequence[ImageRows]) -> list[torch.Tensor]:
        return [self._vision[name][image][low:high] for name, image, low, high in images]


def _sample_rows(chunks: Sequence[Chunk]) -> list[SampleRow]:
    sequences = [chunk.sequence for chunk in chunks if chunk.samples]
    return [SampleRow(s.sampling, s.tokens, s.num_prompt) for s in sequences]
