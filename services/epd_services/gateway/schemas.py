"""The body of a chat completion request, strictly typed and bounded; its parser echoes nothing."""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from epd.errors import InvalidRequestError
from epd.request import SamplingParams

__all__ = [
    "ChatRequest",
    "ImagePart",
    "Message",
    "StreamOptions",
    "TextPart",
    "chat_request_schema",
    "parse_chat_request",
]

MAX_MESSAGES = 512
MAX_PARTS = 128
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", frozen=True)

Text = Annotated[str, Field(max_length=1 << 20)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]


class TextPart(BaseModel):
    """A piece of text."""

    model_config = _STRICT
    type: Literal["text"]
    text: Text


class ImageURLField(BaseModel):
    """Where an image comes from. `detail` is accepted and makes no difference."""

    model_config = _STRICT
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(BaseModel):
    """An image, as a `data:` URL or an http(s) URL."""

    model_config = _STRICT
    type: Literal["image_url"]
    image_url: ImageURLField | str

    @property
    def url(self) -> str:
        """The URL, whichever way it was written."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    """One turn of the conversation."""

    model_config = _STRICT
    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content as parts."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = _STRICT
    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """POST /v1/chat/completions. Fields not listed here are ignored and named in a header."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow", frozen=True)

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: Annotated[str, Field(max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = None
    pruning: dict[str, Any] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    @property
    def images(self) -> list[ImagePart]:
        """Every image part, in order."""
        return [p for m in self.messages for p in m.parts if isinstance(p, ImagePart)]

    @property
    def ignored(self) -> list[str]:
        """Names of unknown fields, as far as they can stand in a header."""
        names = [name for name in self.model_extra or {} if _FIELD_NAME.fullmatch(name)]
        return sorted(names)[:16]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, *, max_tokens: int, temperature: float) -> SamplingParams:
        """How tokens are drawn; the arguments stand in for fields that were left out."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        top_k = self.top_k or 0
        params = SamplingParams(
            temperature=_given(self.temperature, temperature),
            top_p=_given(self.top_p, 1.0),
            top_k=max(top_k, 0),
            min_p=_given(self.min_p, 0.0),
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            presence_penalty=_given(self.presence_penalty, 0.0),
            frequency_penalty=_given(self.frequency_penalty, 0.0),
            seed=secrets.randbits(63) if self.seed is None else self.seed & ((1 << 63) - 1),
            max_tokens=self.max_completion_tokens or self.max_tokens or max_tokens,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )
        params.validate()
        return params


def chat_request_schema() -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON schema of a request, and the definitions it refers to, for an OpenAPI document."""
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    return schema, schema.pop("$defs")


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


_FIELD_NAME = re.compile(r"[A-Za-z0-9_.-]{1,48}")
# fields whose silent loss would change the answer; the listed values ask for nothing
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "best_of": (1,),
    "use_beam_search": (False,),
    "echo": (False,),
    "suffix": ("",),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "image_embeds": (),
    "lora_path": (),
    "kv_transfer_params": (),
    "prompt_logprobs": (0,),
}
_KNOWN_NAMES = frozenset(
    {*ChatRequest.model_fields, "content", "role", "type", "text", "image_url", "url", "detail"}
    | {"include_usage"}
)
_SAFE = frozenset(
    {
        "missing", "string_type", "int_type", "float_type", "bool_type", "list_type", "dict_type",
        "model_type", "model_attributes_type", "literal_error", "finite_number",
        "int_from_float", "greater_than", "greater_than_equal", "less_than", "less_than_equal",
        "too_long", "too_short", "string_too_long", "string_too_short",
    }
)  # fmt: skip


def parse_chat_request(body: bytes) -> ChatRequest:
    """The typed request in `body`. Raises `InvalidRequestError` naming the first field at fault."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_input=False)) from None
    for name, value in (request.model_extra or {}).items():
        if name in _UNSUPPORTED and value is not None and value not in _UNSUPPORTED[name]:
            raise InvalidRequestError(f"{name} is not supported.", name)
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true.", "top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options needs stream to be true.", "stream_options")
    return request


def _refusal(errors: list[ErrorDetails]) -> InvalidRequestError:
    """One fixed text about the deepest fault; unions report one fault per branch."""
    # of two branches equally deep, the one of another type says least
    error = max(errors, key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))
    if error["type"] == "json_invalid":
        return InvalidRequestError("The body is not valid JSON.")
    param = _param(error["loc"])
    text = error["msg"] if error["type"] in _SAFE else "The value is not valid"
    return InvalidRequestError(f"{param}: {text}." if param else f"{text}.", param or None)


def _param(location: tuple[int | str, ...]) -> str:
    """The path of a field, from our own field names and indices only."""
    path = ""
    for i, step in enumerate(location):
        if isinstance(step, int):
            path += f"[{step}]"
        elif step in _KNOWN_NAMES and not _is_tag(location, i):
            path += f".{step}" if path else step
    return path


def _is_tag(location: tuple[int | str, ...], i: int) -> bool:
    # the discriminator's value follows the index of a part
    return i > 0 and isinstance(location[i - 1], int) and location[i] in ("text", "image_url")
