"""Limits of the gateway, from arguments or `EPD_…` environment variables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from epd.errors import ConfigError, InvalidRequestError
from epd.models.card import ModelCard
from epd.pruning_policy import PruningPolicy
from epd.pruning_spec import PruningSpec

__all__ = ["GatewaySettings"]

MiB = 1 << 20


def _number(value: object) -> object:
    """A variable's text as the number it spells: "1" is a count, "1.0" a share."""
    if not isinstance(value, str):
        return value
    return int(value) if value.strip().isdecimal() else float(value)


Budget = Annotated[
    Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)], BeforeValidator(_number)
]


class GatewaySettings(BaseSettings):
    """Every bound of the HTTP front. Sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(
        env_prefix="EPD_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    model_name: str | None = Field(None, description="name in /v1/models; None: the checkpoint's")
    api_key_file: Path | None = Field(None, description="file with one API key a line")

    max_body_bytes: int = Field(32 * MiB, ge=1024)
    body_seconds: float = Field(30.0, gt=0)
    max_headers: int = Field(100, ge=8)
    max_header_bytes: int = Field(64 * 1024, ge=1024)
    intake_bytes: int = Field(1024 * MiB, ge=MiB, description="bodies and pixels held at once")
    head_seconds: float = Field(10.0, gt=0, description="a request's head may take this long")
    idle_seconds: float = Field(75.0, gt=0, description="an unused connection stays this long")
    max_connections: int = Field(2048, ge=1)

    max_images: int = Field(8, ge=0)
    max_image_bytes: int = Field(20 * MiB, ge=1024)
    max_image_pixels: int = Field(40_000_000, ge=4)
    decode_children: int = Field(2, ge=1, le=32)
    decode_seconds: float = Field(2.0, gt=0)
    decode_memory_bytes: int = Field(512 * MiB, ge=64 * MiB)
    decode_queue: int = Field(1024, ge=1)

    fetch_images: bool = Field(False, description="allow http(s) image URLs")
    fetch_domains: tuple[str, ...] = Field((), description="only these hosts; empty: any public")
    fetch_ports: tuple[int, ...] = (80, 443)
    fetch_seconds: float = Field(5.0, gt=0)
    max_prompt_chars: int = Field(1 << 20, ge=1)

    request_seconds: float = Field(120.0, gt=0)
    default_max_tokens: int = Field(256, ge=1)
    default_temperature: float = Field(0.0, ge=0.0, le=2.0)

    pruning: dict[str, Any] | None = Field(
        None, description='default of requests that do not ask: {"method": "script", "keep": 0.25}'
    )
    pruning_min_keep: Budget | None = Field(
        None, description="smaller budgets are raised to this count or share of an image's tokens"
    )
    pruning_floor: Budget | None = Field(
        None, description="budgets fall to this count or share as the ledger fills"
    )
    layer_pruning: str | None = Field(
        None, description="method inside the LLM that requests may ask for: adaptinfer[:LAYERS]"
    )

    keepalive_seconds: float = Field(10.0, gt=0)
    stall_seconds: float = Field(30.0, gt=0, description="one send to a client may take this long")
    stream_buffer_bytes: int = Field(256 * 1024, ge=1024)

    def pruning_policy(self, card: ModelCard) -> PruningPolicy:
        """What requests for this model may ask of pruning.

        Raises `ConfigError` when the default cannot be served.
        """
        policy = PruningPolicy(
            image_tokens=card.image_tokens,
            layer_method=self.layer_pruning.partition(":")[0] if self.layer_pruning else None,
            min_keep=self.pruning_min_keep,
            floor=self.pruning_floor,
        )
        if self.pruning is None:
            return policy
        try:
            policy.resolve(self.pruning)
            return replace(policy, default=PruningSpec.parse(self.pruning))
        except InvalidRequestError as error:
            raise ConfigError(f"the default pruning cannot be served: {error}") from None
