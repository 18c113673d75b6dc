"""Weights that no stage uses now, kept in host memory so that a later role finds them there.

On a CPU that is the memory they are in anyway. On CUDA each tensor gets a pinned copy, made once
and kept: unloading again frees device memory and copies nothing, loading is one fast transfer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["Component", "WarmWeights"]


@dataclass(slots=True, kw_only=True)
class Component:
    """Something with weights: `modules` hold its tensors, `num_bytes` is what they take."""

    name: str
    value: Any
    modules: tuple[nn.Module, ...]
    num_bytes: int
    pinned: list[torch.Tensor] = field(default_factory=list)


class WarmWeights:
    """Components at rest, and pinned copies of others, together within `limit` bytes."""

    def __init__(self, limit: int, device: str) -> None:
        self.limit = limit
        self._device = torch.device(device)
        self._resting: dict[str, Component] = {}
        self._held: dict[str, int] = {}

    @property
    def used(self) -> int:
        """Bytes of host memory that are spent on this."""
        return sum(self._held.values())

    def rests(self, name: str) -> bool:
        """Whether the component of that name is here, off the device."""
        return name in self._resting

    def prepare(self, component: Component) -> bool:
        """Whether the component may rest here; its pinned copies exist from now on."""
        name = component.name
        if name not in self._held:
            if self.used + component.num_bytes > self.limit:
                return False
            self._held[name] = component.num_bytes
        if self._device.type == "cuda" and not component.pinned:
            self._pin(component)
        return True

    def keep(self, component: Component) -> bool:
        """Take a component that nobody uses off the device; False if it does not fit here."""
        if not self.prepare(component):
            return False
        if component.pinned:
            copies = iter(component.pinned)
            _replace(component, lambda _: next(copies))
        self._resting[component.name] = component
        return True

    def take(self, name: str) -> Component | None:
        """A component at rest, on the device again; None if it does not rest here."""
        component = self._resting.pop(name, None)
        if component is None:
            return None
        if component.pinned:
            _replace(component, lambda copy: copy.to(self._device, non_blocking=True))
            torch.cuda.synchronize(self._device)
        else:
            del self._held[name]
        return component

    def forget(self, name: str) -> None:
        """Drop a component at rest and what is held for it."""
        self._resting.pop(name, None)
        self._held.pop(name, None)

    def _pin(self, component: Component) -> None:
        def copy(tensor: torch.Tensor) -> torch.Tensor:
            pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
            component.pinned.append(pinned.copy_(tensor))
            return tensor

        _replace(component, copy)


def _replace(component: Component, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put what `change` makes of it in the place of every tensor, always in the same order."""
    with torch.no_grad():
        for module in component.modules:
            module._apply(change)  # type: ignore[no-untyped-call]  # untyped in torch
