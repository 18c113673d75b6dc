"""Chat messages to token ids, through the model's own template and tokenizer. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from tokenizers import Tokenizer

from epd.errors import CheckpointError, InvalidRequestError
from epd.models.files import problem
from epd.template import ChatTemplate, TemplateLimitError, TemplateRefusedError

if TYPE_CHECKING:
    from pathlib import Path

    from epd.models.card import ModelCard

__all__ = ["ChatFormatter", "load_tokenizer"]

_ROLES = ("system", "user", "assistant")
_MAX_MESSAGES = 512
_PROBE = "epd probe"
_RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError,
                  ArithmeticError, RecursionError)  # fmt: skip


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory. Raises `CheckpointError`."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise problem(
            f"Cannot load the tokenizer of {path}.",
            "It has no tokenizer.json.",
            "Convert the tokenizer once: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises a bare Exception
        raise problem(f"Cannot read {file}.", f"It is no tokenizer ({type(error).__name__}).",
                      "Download or copy the checkpoint again.") from None  # fmt: skip


class ChatFormatter:
    """Renders messages with the checkpoint's chat template and tokenises the result.

    Raises `CheckpointError` when built on a template that cannot be compiled, that reaches for
    Python's internals, or that runs away.
    """

    def __init__(self, card: ModelCard) -> None:
        self.tokenizer = load_tokenizer(card.path)
        self.card = card
        self._bos = card.special_tokens.get("bos_token")
        self._image_text = None
        if card.image_token_id is not None:
            self._image_text = self.tokenizer.id_to_token(card.image_token_id)
        self._template: ChatTemplate | None = None
        self._takes_text = self._takes_parts = True
        if card.chat_template is not None:
            self._adopt(card.chat_template)

    def tokenize(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, one placeholder token per image part, bos exactly once.

        Content is text or a list of `{"type": "text", "text": ...}` and `{"type": "image"}`
        parts. Raises `InvalidRequestError` for other shapes, for messages that the template
        refuses, and when the text itself contains the image placeholder.
        """
        checked = _checked(messages)
        text = self._render(checked, add_generation_prompt)
        token_ids = self.encode(text)
        wanted = sum(part["type"] == "image" for message in checked for part in message.parts)
        found = token_ids.count(
            -1 if self.card.image_token_id is None else self.card.image_token_id
        )
        if found != wanted:
            why = (
                "the model's image token may not appear in text"
                if found > wanted
                else "the model's template leaves out images of this role or place"
            )
            raise InvalidRequestError(
                f"the prompt holds {found} image placeholders for {wanted} images; {why}",
                "messages",
            )
        return token_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with bos once if the model uses one."""
        has_bos = bool(self._bos) and text.startswith(str(self._bos))
        token_ids: list[int] = self.tokenizer.encode(text, add_special_tokens=not has_bos).ids
        return token_ids

    def _adopt(self, source: str) -> None:
        """Compile the template and find out which of the two content shapes it prints."""
        try:
            self._template = ChatTemplate(source)
        except (TemplateError, RecursionError) as error:
            raise self._broken(error) from None
        probe = [{"type": "text", "text": _PROBE}]
        self._takes_parts = self._prints([{"role": "user", "content": probe}])
        self._takes_text = self._prints([{"role": "user", "content": _PROBE}])

    def _prints(self, messages: list[dict[str, Any]]) -> bool:
        try:
            text = self._run(messages, False)
        except TemplateLimitError as error:
            raise self._broken(error) from None
        except InvalidRequestError:
            return False
        return _PROBE in text and "{'" not in text

    def _render(self, messages: list[_Message], add_generation_prompt: bool) -> str:
        if self._template is None:
            raise problem(
                f"{self.card.name} has no chat template.",
                "Neither chat_template.jinja nor tokenizer_config.json holds one.",
                "Send a plain prompt instead, or add the publisher's chat_template.jinja.",
            )
        shaped = [{"role": m.role, "content": self._shape(m)} for m in messages]
        try:
            return self._run(shaped, add_generation_prompt)
        except TemplateLimitError:
            raise InvalidRequestError(
                "the messages are too long for the model's chat template", "messages"
            ) from None

    def _shape(self, message: _Message) -> str | list[dict[str, str]]:
        """Content in the form it came in, or the other one if the template takes only that."""
        if self._takes_parts and not (message.is_text and self._takes_text):
            return message.parts
        return "".join(
            (self._image_text or "") if part["type"] == "image" else part["text"]
            for part in message.parts
        )

    def _run(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        assert self._template is not None
        special = {"bos_token": "", "eos_token": "", **self.card.special_tokens}
        values = {"messages": messages, "add_generation_prompt": add_generation_prompt,
                  "tools": None, "documents": None, **special}  # fmt: skip
        try:
            return self._template.render(values)
        except TemplateRefusedError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from None
        except TemplateLimitError:
            raise
        except SecurityError as error:
            raise self._broken(error) from None
        except _RENDER_ERRORS:
            raise InvalidRequestError(
                "the model's chat template cannot render these messages", "messages"
            ) from None

    def _broken(self, error: Exception) -> CheckpointError:
        return problem(
            f"Refusing the chat template of {self.card.name}.",
            f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " "),
            "Replace it with the template of the model's publisher.",
        )


@dataclass(frozen=True, slots=True)
class _Message:
    """Content as parts; `is_text` when it came as one string."""

    role: str
    parts: list[dict[str, str]]
    is_text: bool


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[_Message]:
    """The messages in one form. Raises `InvalidRequestError`."""
    if isinstance(messages, str | bytes) or not 0 < len(messages) <= _MAX_MESSAGES:
        raise InvalidRequestError(f"messages takes 1 to {_MAX_MESSAGES} messages", "messages")
    return [_checked_message(message) for message in messages]


def _checked_message(message: Mapping[str, Any]) -> _Message:
    role = message.get("role") if isinstance(message, Mapping) else None
    role = "system" if role == "developer" else role
    if role not in _ROLES:
        raise InvalidRequestError(f"a message's role is one of {', '.join(_ROLES)}", "messages")
    content = message.get("content")
    if isinstance(content, str):
        return _Message(role, [{"type": "text", "text": content}], True)
    if not isinstance(content, list) or not content:
        raise InvalidRequestError("a message's content is text or a list of parts", "messages")
    return _Message(role, [_checked_part(part) for part in content], False)


def _checked_part(part: object) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return {"type": "image"}
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(text, str):
        raise InvalidRequestError("a content part is text or an image", "messages")
    return {"type": "text", "text": text}
