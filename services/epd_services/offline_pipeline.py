"""All three stages in one process with random weights: what the offline benchmark measures.

Nothing here knows a socket, a setting or a tokenizer: prompts are random token ids, questions that
pruning reads are random vectors.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epd.config import EngineConfig
from epd.core import EngineCore, NewSequence
from epd.errors import ConfigError, EPDError, InvalidRequestError
from epd.graphs import default_recorder
from epd.kv.gate import choose_formats
from epd.kv.pool import KVPool
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.quantization import SCHEMES
from epd.models.query import QueryEncoder
from epd.models.vision import VisionEncoder
from epd.pruning_spec import PruningSpec
from epd.request import SamplingParams
from epd.step import StepResult
from epd.vision_pool import ImageEncoder, TokenSelector, check_pruning, make_pools, pruned
from epd_pruning.base import VisionInputs

__all__ = ["FirstToken", "OfflinePipeline", "Sizes"]

Image = np.ndarray[Any, np.dtype[np.uint8]]
Pool = list[torch.Tensor]
_BLOCK = 16
_PICTURE = (480, 640, 3)
_ENCODE_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the engine is built."""

    text_tokens: int = 64
    max_num_seqs: int = 256
    max_batched_tokens: int = 8192
    longest_output: int = 160


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Seconds to the first token of a lone request, and their parts."""

    pixels: float
    encode: float
    prefill: float

    @property
    def total(self) -> float:
        """Time to first token."""
        return self.pixels + self.encode + self.prefill


class _RandomQueries(QueryEncoder):
    """A vector per question, of the decoder's width and drawn from a seed: it means nothing."""

    def __init__(self, decoder: Decoder, seed: int) -> None:
        self.tower, self.sign = None, 1
        self._decoder = decoder
        self._random = torch.Generator(decoder.device).manual_seed(seed)
        self._known: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()

    def _compute(self, kind: str, text: str) -> torch.Tensor:
        if kind != "llm_embed_mean":
            return super()._compute(kind, text)
        shape, device = (1, self._decoder.config.hidden_size), self._decoder.device
        return torch.randn(shape, generator=self._random, device=device)


@dataclass(frozen=True, slots=True)
class _Processed:
    """An image encoder whose pixels are made already."""

    encoder: VisionEncoder
    pixels: torch.Tensor

    def num_tokens(self, width: int, height: int) -> int:
        return self.encoder.num_tokens(width, height)

    def encode_inputs(self, images: Sequence[Image], needs: frozenset[str]) -> list[VisionInputs]:
        assert len(images) == len(self.pixels)
        return self.encoder.encode_pixels(self.pixels, needs)

    def check_needs(self, needs: frozenset[str]) -> None:
        self.encoder.check_needs(needs)


class OfflinePipeline:
    """An encoder and an engine core of a config directory's shape, weights drawn from a seed."""

    def __init__(
        self, config_dir: Path, *, device: str, dtype: torch.dtype, seed: int, sizes: Sizes,
        kv: str = "auto", scheme: str | None = None, cuda_graphs: bool = True,
        pruning: PruningSpec | None = None,
    ) -> None:  # fmt: skip
        """`scheme` rounds the decoder's weights, `pruning` is what every request asks for.

        Raises `ConfigError` for a scheme that does not exist or pruning that cannot be done here.
        Ready to be measured: everything is compiled, and recorded with `cuda_graphs`.
        """
        if scheme is not None and scheme not in SCHEMES:
            known = ", ".join(SCHEMES)
            raise ConfigError(f"quantize must be one of {known}, not {scheme[:60]!r}")
        self.card = ModelCard.load(config_dir, weights=False)
        self.device = torch.device(device)
        self.sizes = sizes
        self._rng = np.random.default_rng(seed)
        self._names = (f"request-{number}" for number in itertools.count())
        self.encoder = VisionEncoder.random(self.card, device, dtype, seed)
        self.decoder = Decoder.random(self.card.text, device, dtype, seed, scheme=scheme)
        self.image_tokens = self.encoder.num_tokens(_PICTURE[1], _PICTURE[0])
        queries = _RandomQueries(self.decoder, seed)
        self._pruning, self._selector = pruning, TokenSelector(queries)
        if pruning is not None:
            self._check(pruning, queries)
        self.core = EngineCore(
            self.decoder, self.card, config=self._config(dtype, kv, cuda_graphs), device=self.device
        )
        self.core.warm_up()
        self.encoder.repeat_with(default_recorder(self.device, graphs=cuda_graphs))

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights of both halves hold."""
        return self.encoder.resident_bytes() + self.decoder.resident_bytes()

    def _config(self, dtype: torch.dtype, kv: str, cuda_graphs: bool) -> EngineConfig:
        """A KV pool for every sequence at its longest, or as much of it as there is memory for."""
        text = self.card.text
        formats, _ = choose_formats(self.decoder, self.card, kv)
        block = KVPool.block_bytes(
            text.num_layers, block_size=_BLOCK, num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim, dtype=dtype, formats=formats,
        )  # fmt: skip
        longest = self.sizes.text_tokens + self.image_tokens + self.sizes.longest_output
        wanted = self.sizes.max_num_seqs * (-(-longest // _BLOCK) + 1)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            wanted = min(wanted, int(0.85 * free) // block)
        return EngineConfig(
            block_size=_BLOCK, num_blocks=max(wanted, 2), max_num_seqs=self.sizes.max_num_seqs,
            max_batched_tokens=self.sizes.max_batched_tokens, prefix_cache=False, kv=kv,
            cuda_graphs=cuda_graphs,
        )  # fmt: skip

    def _check(self, pruning: PruningSpec, queries: QueryEncoder) -> None:
        if pruning.layer_method is not None:
            raise ConfigError(
                "Cannot prune inside the decoder here.\n"
                "The offline benchmark prunes before it only.\n"
                "python -m epd_services.prefill_bench CONFIG_DIR"
            )
        try:
            check_pruning(pruning, self.encoder, queries)
        except InvalidRequestError as error:
            raise ConfigError(
                f"Cannot prune so with random weights.\n{error}.\n"
                'add "params":{"query_encoder":"llm_embed_mean"} to --pruning'
            ) from None

    def pictures(self, count: int) -> list[Image]:
        """Random pictures of 640 by 480, no two alike."""
        return [self._rng.integers(0, 256, _PICTURE, np.uint8) for _ in range(count)]

    def synchronize(self) -> float:
        """The time on this clock once the device has done everything asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def first_token(self, pictures: Sequence[Image], *, split: bool) -> FirstToken:
        """Time one request, alone, from pixels in memory to its first token on the host.

        With `split` the device is waited for between the stages, so that each has its own time;
        without, the whole is under `prefill`.
        """
        begin = pixels_done = encode_done = self.synchronize()
        pixels = self.encoder.pixels(pictures)
        if split:
            pixels_done = self.synchronize()
        pools = self._pools(_Processed(self.encoder, pixels), pictures)
        if split:
            encode_done = self.synchronize()
        self._add(pools, max_tokens=1)
        while not self._step().tokens:
            pass
        end = self.synchronize()
        return FirstToken(pixels_done - begin, encode_done - pixels_done, end - encode_done)

    def decode_seconds(self, batch: int, *, steps: int) -> list[float]:
        """Seconds of each of `steps` steps in which `batch` one-image requests get a token each."""
        encoded = [self._encode([picture])[0] for picture in self.pictures(min(batch, 4))]
        names = [
            self._add([encoded[i % len(encoded)]], max_tokens=self.sizes.longest_output)
            for i in range(batch)
        ]
        seconds: list[float] = []
        begin = self.synchronize()
        while len(seconds) < steps and self.core.has_work():
            result = self._step()
            end = self.synchronize()
            # steps that also compute prompts are not decode steps
            if len(result.tokens) == result.num_tokens == batch:
                seconds.append(end - begin)
            begin = end
        for name in names:
            self.core.cancel(name)
        return seconds

    def burst(self, pictures: Sequence[Image], output_tokens: int) -> Iterator[int]:
        """Serve one request per picture, all present at the start; yields how many have ended.

        As in a worker, images are encoded in a thread of their own while the core steps.
        """
        done = 0
        groups = [pictures[i : i + _ENCODE_BATCH] for i in range(0, len(pictures), _ENCODE_BATCH)]
        with ThreadPoolExecutor(1) as encoding:
            encoded: list[Future[list[Pool]]] = [
                encoding.submit(self._encode, group) for group in groups
            ]
            while done < len(pictures):
                while encoded and (encoded[0].done() or not self.core.has_work()):
                    for pool in encoded.pop(0).result():
                        self._add([pool], max_tokens=output_tokens)
                ended = sum(t.finish_reason is not None for t in self._step().tokens)
                done += ended
                if ended:
                    yield done
        self.synchronize()

    def _encode(self, pictures: Sequence[Image]) -> list[Pool]:
        return self._pools(self.encoder, pictures)

    def _pools(self, encoder: ImageEncoder, pictures: Sequence[Image]) -> list[Pool]:
        """What an encode worker hands on of each picture."""
        names = [str(number) for number in range(len(pictures))]
        return make_pools(encoder, pictures, [self._pruning] * len(pictures), names)

    def _add(self, pools: Sequence[Pool], *, max_tokens: int) -> str:
        """Queue a request of random text around its images, which are pruned now; its name."""
        name, image = next(self._names), self.card.image_token_id
        assert image is not None
        count = self.sizes.text_tokens
        # on whichever side of the placeholder there are more ids
        low, high = max((0, image), (image + 1, self.card.vocab_size), key=lambda r: r[1] - r[0])
        ids, half = self._rng.integers(low, high, count).tolist(), count // 2
        sequence = NewSequence(
            request_id=name, attempt=0, image_token_id=image,
            prompt_token_ids=[*ids[:half], *[image] * len(pools), *ids[half:]],
            mm_keys=[f"{name}/{i}" for i in range(len(pools))],
            sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        )  # fmt: skip
        chosen = self._selector.select_all(pools, self._pruning, [name] * len(pools))
        if self._pruning is not None:
            sequence = pruned(sequence, self._pruning, [kept for _, kept in chosen])
        self.core.add(sequence, [tokens for tokens, _ in chosen])
        return name

    def _step(self) -> StepResult:
        result = self.core.step()
        if result.failed:
            raise EPDError(f"a request failed: {result.failed[0].message}")
        return result
