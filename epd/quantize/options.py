"""What to quantise and how. Importing this loads no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from epd.errors import ConfigError
from epd.kv.formats import KV_CODED, KV_PLAIN
from epd.models.text_config import DecoderConfig

__all__ = ["GROUP_SIZES", "HEADS", "SCHEMES", "QuantizeOptions"]

SCHEMES = {"w4a16": "w4a16", "qqq": "w4a8-int8", "fireq": "w4a8-fp8", "fp8": "fp8"}
"""Names on the command line, and the bits of weights and activations they are served in."""

HEADS = ("bf16", "fp8")
"""The LM head as it is stored, or in eight bits."""

GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """A scheme and its choices.

    `group_size` inputs share a scale: 32, 64, 128, 0 for one scale per row, None for the largest
    that divides every layer. `nearest` rounds to nearest with nothing before it: the baseline.
    `rotate` applies a Hadamard rotation to the values of each head. `search_tokens` bounds what
    smoothing is searched on, `steps` how many candidates it tries. `kv` is how keys and values
    will be held: bf16 (plain), fp8 or int4; for int4, keys are scaled first unless `nearest`.
    `head` is how the LM head is stored, bf16 (as it is) or fp8; None stands for fp8 in the schemes
    whose layers need FP8 arithmetic anyway. `vision` quantises vision tower and projector as well.
    """

    scheme: str
    group_size: int | None = None
    nearest: bool = False
    rotate: bool = False
    steps: int = 20
    search_tokens: int = 2048
    kv: str = KV_PLAIN
    head: str | None = None
    vision: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ConfigError(
                f"Unknown quantisation scheme {self.scheme[:60]!r}.\n"
                f"Four schemes are built in.\nChoose one of {', '.join(SCHEMES)}."
            )
        if self.group_size not in (None, 0, *GROUP_SIZES):
            raise ConfigError(
                f"A group size of {self.group_size} is not supported.\n"
                "The kernels share a scale among 32, 64 or 128 inputs, or a whole row.\n"
                "Choose 32, 64, 128, or 0 for one scale per row."
            )
        if self.kv not in (KV_PLAIN, *KV_CODED):
            raise ConfigError(
                f"Unknown KV format {self.kv[:60]!r}.\nKeys and values are plain or coded.\n"
                f"Choose one of {', '.join((KV_PLAIN, *KV_CODED))}."
            )
        if self.head not in (None, *HEADS):
            raise ConfigError(
                f"Unknown format {self.head[:60]!r} of the head.\nIt is stored plain or in FP8.\n"
                f"Choose one of {', '.join(HEADS)}."
            )
        if self.steps < 2 or self.search_tokens < 1:
            raise ConfigError("Nothing to search.\nsteps and search_tokens are too small.\n"
                              "Give at least 2 steps and 1 token.")  # fmt: skip

    @property
    def stored_scheme(self) -> str:
        """The bits of weights and activations, as `quantization_config` names them."""
        return SCHEMES[self.scheme]

    def resolved(self, config: DecoderConfig) -> QuantizeOptions:
        """With a head, and a group size that divides the inputs of every layer.

        Raises `ConfigError` if none does, or for a head that cannot be.
        """
        return replace(self, head=self._head(config), group_size=self._fitting(config))

    def _head(self, config: DecoderConfig) -> str:
        fits = config.hidden_size % 16 == 0
        if self.head == "fp8" and not fits:
            raise ConfigError(
                f"A head over hidden_size = {config.hidden_size} cannot be in FP8.\n"
                "The FP8 product takes multiples of 16 inputs.\nLeave the head as it is: bf16."
            )
        eight = self.stored_scheme in ("fp8", "w4a8-fp8") and fits
        return self.head or ("fp8" if eight else "bf16")

    def _fitting(self, config: DecoderConfig) -> int | None:
        widths = {
            "hidden_size": config.hidden_size,
            "num_heads * head_dim": config.num_heads * config.head_dim,
            "intermediate_size": config.intermediate_size,
        }
        if self.rotate and config.head_dim & (config.head_dim - 1):
            raise ConfigError(
                f"Cannot rotate heads of {config.head_dim} channels.\n"
                "A Hadamard matrix is built for powers of two only.\nLeave the rotation out."
            )
        if self.scheme == "fp8" or self.group_size == 0:
            return self.group_size
        sizes = GROUP_SIZES if self.group_size is None else (self.group_size,)
        for size in sizes:
            bad = [f"{name} = {width}" for name, width in widths.items() if width % size]
            if not bad:
                return size
        raise ConfigError(
            f"Groups of {sizes[-1]} inputs do not divide {bad[0]}.\n"
            "Every group of a layer must be whole.\n"
            "Choose a smaller group size, or 0 for one scale per row."
        )

    @property
    def format_version(self) -> int:
        """The lowest version of our layout that can say it: older readers read what they can."""
        return 2 if self.vision or self.head == "fp8" else 1

    def described(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)
