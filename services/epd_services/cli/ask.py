"""`epd ask`: a question about pictures, to a running server or to the built-in model right here."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epd.errors import MediaError
from epd_services.cli.terminal import note, print_json, usage_error
from epd_services.client import ChatClient

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from epd_services.client import Reply

__all__ = ["ask"]

DEFAULT_URL = "http://127.0.0.1:8000"


def ask(
    parts: Sequence[str],
    *,
    url: str | None,
    stream: bool,
    max_tokens: int,
    api_key: str | None,
    as_json: bool,
) -> int:
    """Print the answer; the exit code: 0, or 1 when the service refused or broke off."""
    question, images = parts[-1], [_file(part) for part in parts[:-1]]
    if Path(question).is_file() or not question.strip():
        raise usage_error(
            "Cannot ask without a question.", "The last argument is the question.",
            'epd ask PICTURE.png "What color is the circle?"',
        )  # fmt: skip
    address = url or DEFAULT_URL
    if not asyncio.run(_answers(address)):
        if url is not None:
            raise usage_error(f"Cannot reach {url}.", "No service answers there.", "epd serve")
        note(f"no server on {address}: answering here with the built-in model")
        return _ask_here(question, images, max_tokens=max_tokens, as_json=as_json)
    shown = _printer() if stream and not as_json else None
    reply = asyncio.run(_ask(address, question, images, api_key, stream, max_tokens, shown))
    return _tell(reply, streamed=shown is not None, as_json=as_json)


def _file(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise usage_error(
            f"Cannot read the picture {name[:200]!r}.", "There is no such file.",
            'epd ask PICTURE.png "What color is the circle?"  (quote the question)',
        )  # fmt: skip
    return path


async def _answers(url: str) -> bool:
    async with ChatClient(url) as client:
        return await client.get("/live") is not None


async def _ask(
    url: str,
    question: str,
    images: Sequence[Path],
    api_key: str | None,
    stream: bool,
    max_tokens: int,
    on_text: Callable[[str], None] | None,
) -> Reply:
    contents = [path.read_bytes() for path in images]
    async with ChatClient(url, api_key=api_key) as client:
        return await client.ask(
            question, contents, stream=stream, on_text=on_text, max_tokens=max_tokens
        )


def _printer() -> Callable[[str], None]:
    """Prints pieces of an answer, without the white space that it may begin with."""
    begun = False

    def show(text: str) -> None:
        nonlocal begun
        text = text if begun else text.lstrip()
        begun = begun or bool(text)
        print(text, end="", flush=True)

    return show


def _tell(reply: Reply, *, streamed: bool, as_json: bool) -> int:
    if as_json:
        names = ("text", "finish_reason", "error", "code", "usage", "timings", "ttft", "total")
        print_json({name: getattr(reply, name) for name in names})
    elif streamed:
        print()
    elif reply.complete:
        print(reply.text.strip())
    if reply.complete:
        return 0
    note(f"error: {reply.error or 'the answer broke off'} ({reply.code or 'no answer'})")
    return 1


def _ask_here(question: str, images: Sequence[Path], *, max_tokens: int, as_json: bool) -> int:
    import torch

    from epd import LLM, SamplingParams

    torch.set_grad_enabled(False)
    try:
        completion = LLM().chat(
            question, images=list(images), sampling=SamplingParams(max_tokens=max_tokens)
        )
    except MediaError as error:
        raise usage_error(
            "Cannot read a picture.", f"{error}.", "epd ask PICTURE.png QUESTION"
        ) from None
    if not as_json:
        print(completion.text.strip())
        return 0
    line = completion.timeline
    answer: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason.value,
        "usage": {
            "prompt_tokens": completion.usage.prompt_tokens,
            "completion_tokens": completion.usage.completion_tokens,
        },
        "timings": {**line.durations, "ttft": line.ttft, "total": line.events.get("finished")},
    }
    print_json(answer)
    return 0
