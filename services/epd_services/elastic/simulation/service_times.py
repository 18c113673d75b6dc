"""How long each stage takes in the simulation, and where the numbers come from."""

from __future__ import annotations

from dataclasses import dataclass

from epd.roles import Stage
from epd_services.elastic.load import Measured

__all__ = ["CPU", "H200", "PROFILES", "ServiceTimes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceTimes:
    """Seconds: a batch of n takes `base + n * per_item`; transfers are per image and per request.

    Batches are bounded by `encode_batch`, `prefill_batch` and `decode_batch`. A switch takes
    `switch_llm` between prefill and decode, else `switch_encoder`, after its drain.
    """

    name: str
    encode_base: float
    encode_per_image: float
    prefill_base: float
    prefill_per_prompt: float
    decode_base: float
    decode_per_sequence: float
    image_transfer: float
    kv_transfer: float
    switch_llm: float
    switch_encoder: float
    encode_batch: int = 8
    prefill_batch: int = 6
    decode_batch: int = 64

    def encode(self, images: int) -> float:
        """Seconds of a batch of images."""
        return self.encode_base + self.encode_per_image * images

    def prefill(self, prompts: int) -> float:
        """Seconds of a batch of prompts."""
        return self.prefill_base + self.prefill_per_prompt * prompts

    def decode(self, sequences: int) -> float:
        """Seconds of one decode step."""
        return self.decode_base + self.decode_per_sequence * sequences

    def switch(self, old: Stage, new: Stage) -> float:
        """Seconds to unload what `old` needed and load what `new` needs."""
        return self.switch_encoder if Stage.ENCODE in (old, new) else self.switch_llm

    def capacity(self, encode: int, prefill: int, decode: int, *, tokens: int) -> float:
        """Requests a second, of one image and `tokens` each, that a split can just sustain."""
        step = self.decode(self.decode_batch) / self.decode_batch
        return min(
            encode * self.encode_batch / self.encode(self.encode_batch),
            prefill * self.prefill_batch / self.prefill(self.prefill_batch),
            decode / (step * tokens),
        )

    def measured(self) -> Measured:
        """The same for a balancer that starts without measurements of its own."""
        return Measured(
            encode=self.encode(1), prefill=self.prefill(1), decode_base=self.decode_base,
            decode_per_sequence=self.decode_per_sequence, decode_batch=self.decode_batch,
            switch=self.switch_encoder,
        )  # fmt: skip


CPU = ServiceTimes(
    name="cpu",
    encode_base=0.0, encode_per_image=0.034, prefill_base=0.0, prefill_per_prompt=0.0425,
    decode_base=0.00425, decode_per_sequence=0.00095, image_transfer=0.0, kv_transfer=0.045,
    switch_llm=0.2, switch_encoder=0.7,
)  # fmt: skip
"""The built-in model, one thread a worker: lines through docs/bench/elastic_times.csv. Hand-over
is `transfer_ms` of 1E1P1D at 2/s in docs/bench/cpu.csv; switches are assumed to take as long as on
the GPUs of the paper, and the table tries longer ones.
"""

H200 = ServiceTimes(
    name="h200",
    encode_base=0.0, encode_per_image=0.0178, prefill_base=0.0, prefill_per_prompt=0.01451,
    decode_base=0.0133, decode_per_sequence=0.0, image_transfer=0.0, kv_transfer=0.05,
    switch_llm=0.2, switch_encoder=0.7,
)  # fmt: skip
"""LLaVA-1.5-7B shapes: TTFT parts and the mean TPOT, flat over the batch, of
docs/bench/offline_eager_h200.csv. Hand-over and switches were not measured there and are assumed.
"""

PROFILES = {profile.name: profile for profile in (CPU, H200)}
