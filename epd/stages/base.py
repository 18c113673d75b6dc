"""What a stage needs from its worker: a way to speak, and tensors whichever way they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from epd.messages import Message
from epd.tensors import from_blob
from epd.wire import Blob

__all__ = ["Host", "Payload", "as_tensor"]

Payload = Blob | torch.Tensor


class Host(Protocol):
    """The worker as its stages see it."""

    @property
    def name(self) -> str: ...

    async def sealed(self, blobs: Sequence[Blob]) -> Sequence[Blob]:
        """The blobs as they may be posted without holding up the event loop."""

    def post(self, to: str, message: Message, payloads: Sequence[Payload] = ()) -> bool:
        """Send to a worker; to this very worker it is a function call on the same tensors."""

    def emit(self, message: Message) -> None:
        """Send to the gateway."""


def as_tensor(payload: Payload, device: torch.device | str) -> torch.Tensor:
    """The tensor itself, or one built over the bytes that came by wire."""
    return from_blob(payload, device) if isinstance(payload, Blob) else payload.to(device)
