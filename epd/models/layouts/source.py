"""The tensors of one stored linear layer, each checked as it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch

from epd.models.checkpoint import Checkpoint
from epd.models.files import problem
from epd.models.quantization import Quantization

__all__ = ["GROUP_SIZES", "LayerSource", "nibbles", "to_signed"]

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSource:
    """Layer `prefix` of a checkpoint, which must be `[rows, width]`."""

    checkpoint: Checkpoint
    prefix: str
    rows: int
    width: int
    quantization: Quantization

    def has(self, suffix: str) -> bool:
        """Whether the layer stores a tensor of this name."""
        return f"{self.prefix}.{suffix}" in self.checkpoint

    def dtype(self, suffix: str) -> str | None:
        """How the header spells the dtype of a tensor, None where there is none of this name."""
        return self.checkpoint.stored_dtype(f"{self.prefix}.{suffix}")

    def get(
        self, suffix: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """A tensor; `CheckpointError` when absent, of another dtype or shape, or not finite."""
        tensor = self.checkpoint.tensor(f"{self.prefix}.{suffix}")
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            self.refuse(suffix, wanted, str(tensor.dtype).removeprefix("torch."))
        if shape is not None and tensor.shape != shape:
            self.refuse(suffix, f"shape {list(shape)}", f"shape {list(tensor.shape)}")
        checked = tensor.dtype.is_floating_point and tensor.element_size() > 1
        if checked and not bool(tensor.isfinite().all()):
            self.refuse(suffix, "finite numbers", "NaN or infinity")
        return tensor

    def groups(self, suffix: str, found: int) -> int:
        """`found` groups along K, checked: whole groups of 32, 64, 128 or K inputs."""
        if found < 1 or self.width % found:
            self.refuse(suffix, f"a group size that divides K = {self.width}", f"{found} groups")
        size = self.width // found
        if size != self.width and size not in GROUP_SIZES:
            self.refuse(suffix, f"groups of 32, 64, 128 or K = {self.width}", f"groups of {size}")
        return found

    def natural_order_of(self, suffix: str) -> None:
        """Refuse a group index that is not k // group size: activation order is not served."""
        if not self.has(suffix):
            return
        index = self.get(suffix, (torch.int32, torch.int64), (self.width,)).long()
        size = self.width // (int(index.max()) + 1) if bool((index >= 0).all()) else 0
        if size < 1 or not torch.equal(index, torch.arange(self.width) // size):
            self.refuse(suffix, "input k in group k // group_size", "activation order (desc_act)")

    def refuse(self, suffix: str, expected: str, found: str) -> NoReturn:
        """Raise the `CheckpointError` that names tensor, expectation and finding."""
        raise problem(
            f"Cannot load the quantised layer {self.prefix}.",
            f"Tensor {self.prefix}.{suffix}: expected {expected}, found {found}.",
            "Use a checkpoint in one of the supported layouts, or quantise the model again.",
        )


_STRAIGHT = (0, 1, 2, 3, 4, 5, 6, 7)


def nibbles(words: torch.Tensor, dim: int, order: tuple[int, ...] = _STRAIGHT) -> torch.Tensor:
    """uint4 values, int32, of `words` int32: eight along `dim` for each word.

    Bits 4i to 4i + 3 of a word hold element `order[i]` of its eight.
    """
    shifts = torch.tensor([4 * order.index(element) for element in range(8)], dtype=torch.int32)
    dim %= words.ndim
    spread = words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (words.ndim - 1 - dim)) & 15
    return spread.flatten(dim, dim + 1)


def to_signed(values: torch.Tensor) -> torch.Tensor:
    """int8 codes -8..7 of stored values 0..15, which are eight more."""
    return (values - 8).to(torch.int8)
