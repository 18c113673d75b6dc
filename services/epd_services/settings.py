"""Every setting of every service, resolved once: flag, then environment, then TOML file, then
default.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import SettingsConfigDict

from epd.config import EngineConfig
from epd.errors import ConfigError
from epd_services.gateway.settings import GatewaySettings

__all__ = ["Settings", "load_settings", "unknown_variables"]

MiB = 1 << 20
# read by single commands, or passed on by one process to another
_OTHER_VARIABLES = frozenset({"CONFIG", "URL", "API_KEY", "ADMIN_URL", "SUPERVISOR_PID"})


class Settings(GatewaySettings):
    """Settings of the whole pipeline.

    Every field is `EPD_<NAME>` in the environment and `name` in TOML.
    """

    model_config = SettingsConfigDict(
        env_prefix="EPD_",
        frozen=True,
        extra="forbid",
        env_ignore_empty=True,
        protected_namespaces=(),
    )

    model: str | None = Field(None, description="directory or hub id; None: the built-in model")
    topology: str = Field("1E1P1D", description="workers by stages, like 2E1P1D, 1E1PD or 1EPD")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    allow_open_http: bool = Field(
        False, description="serve without API keys on an address that other machines reach"
    )

    admin_port: int = Field(
        0, ge=0, le=65535, description="loopback port of the admin API; 0: any free one"
    )
    admin_token_file: Path | None = Field(
        None, description="token of the admin API; None: a new one in the run directory"
    )

    run_dir: Path | None = Field(
        None, description="sockets and logs; None: a private temporary one"
    )
    gateway_address: str | None = Field(None, description="the gateway's wire inbox, to workers")
    bind: str | None = Field(None, description="this process's wire inbox: ipc://… or tcp://…")
    advertise: str | None = Field(
        None, description="the inbox address to tell others, if not `bind`"
    )
    wire_key_file: Path | None = Field(
        None, description="16 to 64 bytes that authenticate the wire"
    )
    dead_after: float = Field(1.25, gt=0, description="seconds of silence that mean death")
    drain_seconds: float = Field(20.0, ge=0)
    health_file: Path | None = Field(
        None, description="a worker touches it every second while it is alive"
    )
    max_inflight: int = Field(256, ge=1, description="requests in the ledger; more get 429")

    cache_url: str | None = Field(
        None,
        description="redis://…, unix://…, memory://; None: a private server if one is installed",
    )
    cache_bytes: int = Field(256 * MiB, ge=MiB)
    cache_entry_bytes: int = Field(32 * MiB, ge=1024)
    cache_ttl: float = Field(3600.0, gt=0)

    device: str = Field("auto", description="cpu, cuda, cuda:N; auto takes cuda when there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = Field(1, ge=1, description="CPU threads of each worker")
    block_size: int = Field(16, ge=1)
    num_blocks: int | None = Field(None, ge=2)
    kv_memory_bytes: int = Field(256 * MiB, ge=MiB)
    max_num_seqs: int = Field(64, ge=1)
    max_batched_tokens: int = Field(2048, ge=16)
    max_model_len: int | None = Field(None, ge=16)
    prefix_cache: bool = True
    chunked_prefill: bool = True
    kv: Literal["auto", "bf16", "fp8", "int4"] = Field(
        "auto", description="keys and values in the model's dtype, 8 or 4 bits; auto: as quantised"
    )
    layer_pruning: str | None = Field(
        None, description="prune inside the decoder: adaptinfer[:LAYERS]"
    )
    cuda_graphs: bool = Field(True, description="on a GPU, replay small steps as CUDA graphs")
    graph_memory_bytes: int = Field(
        1024 * MiB, ge=0, description="limit of what CUDA graphs take; further steps run eagerly"
    )

    elastic: bool = Field(
        False, description="move workers between the stages as the load asks for it"
    )
    elastic_drain_seconds: float = Field(
        5.0, ge=0, description="drain limit of a switch that the elastic controller starts"
    )
    warm_bytes: int = Field(
        2048 * MiB, ge=0, description="host memory of each worker for weights its role does not use"
    )

    failpoints: str | None = Field(
        None, description="for tests: where to fail, like switch.load=exit,admin.ready=pause:2"
    )

    log_format: Literal["auto", "console", "json"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def engine(self) -> EngineConfig:
        """The part the engine core takes."""
        names = EngineConfig.__struct_fields__
        return EngineConfig(**{name: getattr(self, name) for name in names})

    def wire_key(self) -> bytes | None:
        """The key of the wire, read from its file. Raises `ConfigError` if that cannot be a key."""
        if self.wire_key_file is None:
            return None
        try:
            key = self.wire_key_file.read_bytes().strip()
        except OSError as error:
            raise ConfigError(
                f"cannot read the wire key file {self.wire_key_file}: {error.strerror}"
            ) from None
        if not 16 <= len(key) <= 64:
            raise ConfigError(f"the wire key file {self.wire_key_file} must hold 16 to 64 bytes")
        return key

    @property
    def http_is_open(self) -> bool:
        """Whether other machines reach the HTTP port and no API key is asked of them."""
        return self.api_key_file is None and not _is_loopback(self.host)

    def check_http(self) -> None:
        """Raise `ConfigError` if the HTTP port would be open and that was not allowed."""
        if self.http_is_open and not self.allow_open_http:
            raise ConfigError(
                f"Cannot listen on {self.host or 'every address'} without API keys.\n"
                "Everybody who reaches that address could use the service.\n"
                "Set EPD_API_KEY_FILE to a file of keys, or EPD_ALLOW_OPEN_HTTP=1 to allow it."
            )

    def environment(self) -> dict[str, str]:
        """The variables that give a child process these same settings."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        texts = {k: v if isinstance(v, str) else _json_text(v) for k, v in values.items()}
        return {f"EPD_{name.upper()}": text for name, text in texts.items()}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _json_text(value: Any) -> str:
    import json

    return json.dumps(value)


def load_settings(config: Path | None = None, **flags: Any) -> tuple[Settings, dict[str, str]]:
    """The settings, and for every field where its value comes from: flag, env, file or default.

    `config` (or `EPD_CONFIG`) is a TOML file; unknown keys in it are errors. Flags that are None
    count as not given. Raises `ConfigError`.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    path = config or (Path(p) if (p := os.environ.get("EPD_CONFIG")) else None)
    from_file = _read_toml(path) if path else {}
    fields = Settings.model_fields
    from_env = {name for name in fields if os.environ.get(f"EPD_{name.upper()}")}
    chosen = {name: v for name, v in from_file.items() if name not in from_env} | given
    try:
        settings = Settings(**chosen)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    origin = {
        name: "flag" if name in given
        else "env" if name in from_env
        else "file" if name in from_file
        else "default"
        for name in fields
    }  # fmt: skip
    return settings, origin


def unknown_variables() -> list[str]:
    """What each `EPD_…` variable that is no setting may have been meant to be, one line each."""
    names = {name.upper() for name in Settings.model_fields} | _OTHER_VARIABLES
    given = (name.removeprefix("EPD_") for name in os.environ if name.startswith("EPD_"))
    lines = []
    for name in sorted(set(given) - names):
        alike = get_close_matches(name, names, 1)
        meant = f"; EPD_{alike[0]}?" if alike else ""
        lines.append(f"EPD_{name[:64]} is no setting{meant}")
    return lines


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    if unknown := sorted(set(values) - set(Settings.model_fields)):
        raise ConfigError(f"{path} sets {unknown[0]!r}, which is no setting; see: epd config show")
    return values


def _explain(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    name = ".".join(map(str, first["loc"])) or "settings"
    return f"{name}: {first['msg']}"
