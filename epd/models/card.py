"""What a checkpoint says about itself, read without torch or transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epd.errors import CheckpointError
from epd.models.files import TensorEntry, problem, read_json, resolve_directory, weight_entries
from epd.models.quantization import Quantization
from epd.models.registry import supported_models
from epd.models.revision import encoder_revision, model_revision
from epd.models.text_config import DecoderConfig

__all__ = ["ModelCard"]

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float32"}
_LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_DEFAULT_IDS = {"llama": _LLAMA_IDS, "mistral": _LLAMA_IDS}
_TEMPLATE_LIMIT = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The facts of one checkpoint that every process of a deployment agrees on.

    `dtype` is what the weights are stored in. `revision` digests the whole model,
    `encoder_revision` the vision side alone. `quantization` says in how many bits linear
    layers are stored, None for plain floats. `special_tokens` maps `bos_token` and its like to
    their text. `config` is the raw config.json, `entries` where each tensor lies.
    """

    path: Path
    name: str
    model_type: str
    text: DecoderConfig
    vocab_size: int
    hidden_size: int
    max_position: int
    image_token_id: int | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str
    quantization: Quantization | None
    revision: str
    encoder_revision: str
    has_vision: bool
    chat_template: str | None
    special_tokens: Mapping[str, str]
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]

    @property
    def image_tokens(self) -> int:
        """Vision tokens of an image: a LLaVA resizes every image to one size."""
        vision = self.config.get("vision_config") or {}
        clip = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
        side = vision.get("image_size", 224) // vision.get("patch_size", 32 if clip else 16)
        strategy = self.config.get("vision_feature_select_strategy", "default")
        return int(side * side + clip - (strategy == "default"))

    @classmethod
    def load(
        cls, path_or_id: str | Path, *, name: str | None = None, weights: bool = True
    ) -> ModelCard:
        """The card of a directory, or of a hub id when there is a network.

        `weights=False` is for random weights: config.json alone is enough then. Raises
        `CheckpointError` in three lines for whatever cannot be found, read or served.
        """
        path = resolve_directory(path_or_id)
        config = _config(path)
        quantization = _quantization(config)
        entries = weight_entries(path) if weights else {}
        tokenizer_config = read_json(path, "tokenizer_config.json")
        _refuse_code(path, tokenizer_config, "tokenizer_config.json")
        for file in ("processor_config.json", "preprocessor_config.json"):
            _refuse_code(path, read_json(path, file), file)
        section = {k: v for k, v in config["text_config"].items() if k != "quantization_config"}
        text = DecoderConfig.from_text_config(
            section, tie_word_embeddings=config.get("tie_word_embeddings") is True
        )
        return cls(
            path=path,
            name=name or (path.name if Path(path_or_id).expanduser().is_dir() else str(path_or_id)),
            model_type=config["model_type"],
            text=text,
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            max_position=text.max_position,
            image_token_id=_image_token_id(config),
            eos_token_ids=_token_ids(path, config, "eos_token_id"),
            bos_token_id=next(iter(_token_ids(path, config, "bos_token_id")), None),
            dtype=_stored_dtype(config, entries),
            quantization=quantization,
            revision=model_revision(path, entries),
            encoder_revision=encoder_revision(path, config, entries, quantization),
            has_vision=True,
            chat_template=_chat_template(path, tokenizer_config),
            special_tokens=_special_tokens(path, tokenizer_config),
            config=config,
            entries=entries,
        )


def _config(path: Path) -> dict[str, Any]:
    config = read_json(path, "config.json", required=True)
    model_type = config.get("model_type")
    if model_type not in supported_models():
        raise problem(
            f"Cannot serve the model in {path}.",
            f"Its model_type is {str(model_type)[:100]!r}.",
            f"Supported model types: {', '.join(supported_models())}.",
        )
    for key in ("text_config", "vision_config"):
        section = config.setdefault(key, {})
        if not isinstance(section, dict):
            raise problem(f"Cannot read {path / 'config.json'}.", f"Its {key} is not an object.",
                          "Use a complete Hugging Face checkpoint.")  # fmt: skip
        _refuse_code(path, section, "config.json")
    _refuse_code(path, config, "config.json")
    return config


def _quantization(config: Mapping[str, Any]) -> Quantization | None:
    """Of the whole model, or, as some writers put it, of its language side."""
    raw = config.get("quantization_config") or config["text_config"].get("quantization_config")
    return Quantization.from_config(raw) if raw else None


def _refuse_code(path: Path, section: Mapping[str, Any], file: str) -> None:
    nested = section.get("image_processor")
    if "auto_map" in section or (isinstance(nested, dict) and "auto_map" in nested):
        raise problem(
            f"Refusing the model in {path}.",
            f"{file} has an auto_map: it wants Python code of the checkpoint to be run.",
            "Use a checkpoint of a built-in architecture, without custom code.",
        )


def _image_token_id(config: Mapping[str, Any]) -> int:
    value = config.get("image_token_index", config.get("image_token_id", 32000))
    return _token_id(value, "image_token_index")


def _token_ids(path: Path, config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Ids from generation_config.json, else config.json, else the decoder family's default."""
    text = config["text_config"]
    family = text.get("model_type", "llama")
    defaults = _DEFAULT_IDS.get(family, {})
    for source in (read_json(path, "generation_config.json"), text, config, defaults):
        value = source.get(key)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            return tuple(_token_id(item, key) for item in values)
    return ()


def _token_id(value: object, key: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise problem("Cannot serve this checkpoint.", f"Its {key} is not a token id.",
                      "Correct config.json or generation_config.json.")  # fmt: skip
    return value


def _stored_dtype(config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> str:
    """The dtype of the largest float tensor, or what the config says when there are no weights."""
    floats = [entry for entry in entries.values() if entry.dtype in _DTYPES]
    if floats:
        return _DTYPES[max(floats, key=lambda entry: entry.end - entry.start).dtype]
    said = config.get("dtype") or config.get("torch_dtype")
    return said if said in ("float32", "bfloat16", "float16") else "float32"


def _chat_template(path: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The first of chat_template.jinja, chat_template.json, and the tokenizer's own template."""
    file = path / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > _TEMPLATE_LIMIT:
            raise _template_problem(file)
        return file.read_text(encoding="utf-8", errors="replace")
    template = read_json(path, "chat_template.json").get("chat_template")
    template = template or read_json(path, "processor_config.json").get("chat_template")
    template = template or tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and (not isinstance(template, str) or len(template) > _TEMPLATE_LIMIT):
        raise _template_problem(path)
    return template


def _template_problem(path: Path) -> CheckpointError:
    return problem(
        f"Refusing the chat template in {path}.",
        f"It is not text of at most {_TEMPLATE_LIMIT} characters.",
        "Replace it with the template of the model's publisher.",
    )


def _special_tokens(path: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for source in (tokenizer_config, read_json(path, "special_tokens_map.json")):
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = source.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens.setdefault(key, value)
    return tokens
