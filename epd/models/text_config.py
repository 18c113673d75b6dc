"""The shape of a decoder, from the `text_config` of a checkpoint, without torch.

Configuration files leave out what equals the family's default, so the defaults are restated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epd.errors import CheckpointError
from epd.models.files import problem

__all__ = ["DecoderConfig", "RopeConfig", "supported_decoders"]

_COMMON = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768,
         "num_key_value_heads": 32, "use_sliding_window": False}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": {**_COMMON, "intermediate_size": 14336, "num_key_value_heads": 8,
                "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {**_COMMON, **_QWEN},
    "qwen3": {**_COMMON, **_QWEN, "head_dim": 128},
}  # fmt: skip
_ROPE_TYPES = ("default", "linear", "llama3")


def supported_decoders() -> tuple[str, ...]:
    """The `text_config.model_type` values that one decoder definition covers."""
    return tuple(_DEFAULTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary angles: base `theta`, and how long contexts stretch them.

    `low_freq_factor`, `high_freq_factor` and `original_max_position` belong to the llama3 type.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a Llama-family decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: RopeConfig = RopeConfig()

    @classmethod
    def from_text_config(
        cls, raw: Mapping[str, Any], *, tie_word_embeddings: bool = False
    ) -> DecoderConfig:
        """The config of a `text_config`; `tie_word_embeddings` is what the outer config says.

        Raises `CheckpointError` naming whatever this decoder does not compute.
        """
        family = raw.get("model_type", "llama")
        if family not in _DEFAULTS:
            raise _unsupported("decoder", family, ", ".join(_DEFAULTS))
        text = {**_DEFAULTS[family], **raw}
        _refuse_extras(text)
        heads = _positive(text, "num_attention_heads")
        attention_bias = bool(text.get("attention_bias", False)) and family in ("llama", "qwen3")
        config = cls(
            vocab_size=_positive(text, "vocab_size"),
            hidden_size=_positive(text, "hidden_size"),
            intermediate_size=_positive(text, "intermediate_size"),
            num_layers=_positive(text, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_positive(text, "num_key_value_heads", heads),
            head_dim=_positive(text, "head_dim", _positive(text, "hidden_size") // heads),
            max_position=_positive(text, "max_position_embeddings"),
            rms_norm_eps=_number(text, "rms_norm_eps"),
            tie_word_embeddings=bool(tie_word_embeddings or text.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family == "llama" and bool(text.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            rope=_rope(text),
        )
        if heads % config.num_kv_heads or config.head_dim % 2:
            shape = f"{heads} heads, {config.num_kv_heads} KV heads of {config.head_dim}"
            raise _unsupported("attention", shape, "whole groups of heads of even size")
        return config


def _refuse_extras(text: Mapping[str, Any]) -> None:
    if text.get("quantization_config"):
        raise _unsupported("quantization_config", "a quantised checkpoint", "plain weights")
    if text["hidden_act"] != "silu":
        raise _unsupported("hidden_act", text["hidden_act"], "silu")
    window = text.get("sliding_window")
    in_use = bool(text.get("use_sliding_window", True)) and window is not None
    if in_use and not (type(window) is int and window >= text["max_position_embeddings"]):
        raise _unsupported("sliding_window", window, "full attention in every layer")
    kinds = set(text.get("layer_types") or ())
    if kinds - {"full_attention"}:
        raise _unsupported("layer_types", sorted(map(str, kinds)), "full attention in every layer")


def _rope(text: Mapping[str, Any]) -> RopeConfig:
    """Both spellings: `rope_parameters`, or `rope_theta` beside an optional `rope_scaling`."""
    raw = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(raw, Mapping) or any(isinstance(value, Mapping) for value in raw.values()):
        raise _unsupported("rope_parameters", "a set per layer type", "one set for all layers")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise _unsupported("RoPE type", kind, ", ".join(_ROPE_TYPES))
    if raw.get("partial_rotary_factor", text.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise _unsupported("RoPE", "partial_rotary_factor", "rotation of whole heads")
    original = text.get("original_max_position_embeddings") or raw.get(
        "original_max_position_embeddings"
    )
    values = {
        "rope_theta": raw.get("rope_theta") or text.get("rope_theta") or 10000.0,
        "factor": raw.get("factor", 1.0),
        "low_freq_factor": raw.get("low_freq_factor", 1.0),
        "high_freq_factor": raw.get("high_freq_factor", 4.0),
        "original": original or text["max_position_embeddings"],
    }
    return RopeConfig(
        theta=_number(values, "rope_theta"),
        type=kind,
        factor=_number(values, "factor"),
        low_freq_factor=_number(values, "low_freq_factor"),
        high_freq_factor=_number(values, "high_freq_factor"),
        original_max_position=_positive(values, "original"),
    )


def _positive(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 1 << 31:
        raise _unsupported(key, value, "a positive whole number")
    return value


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values[key]
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise _unsupported(key, value, "a positive number")
    return float(value)


def _unsupported(what: str, value: object, supported: str) -> CheckpointError:
    return problem(
        "Cannot serve this checkpoint.",
        f"Its decoder asks for {what}: {str(value)[:100]}.",
        f"Supported: {supported}.",
    )
