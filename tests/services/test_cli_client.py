"""The client against scripted HTTP: streams, repeats, errors, times; and what `epd ask` prints."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable

import httpx
import pytest

from epd_services.cli import ask as ask_module
from epd_services.client import ChatClient, Reply, data_url

Answer = Callable[[httpx.Request], httpx.Response]


def ask(answer: Answer, *, stream: bool = True, images: tuple[bytes, ...] = ()) -> Reply:
    async def run() -> Reply:
        transport = httpx.MockTransport(answer)
        async with ChatClient("http://x/", api_key="k" * 16, transport=transport) as client:
            return await client.ask("What?", images, stream=stream, max_tokens=4)

    return asyncio.run(run())


def chunk(text: str = "", finish: str | None = None, **extra: object) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return json.dumps({"choices": [choice], **extra})


def events(*pairs: tuple[int, str]) -> Answer:
    text = ": stream\n\n" + "".join(f"id: {n}\ndata: {body}\n\n" for n, body in pairs)
    return lambda _: httpx.Response(200, text=text + "data: [DONE]\n\n")


def test_a_stream_is_put_together() -> None:
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": 2}, "timings": {"ttft": 0.5}})
    reply = ask(events((0, chunk(" re")), (1, chunk("d", "stop")), (2, usage)))
    assert (reply.text, reply.finish_reason, reply.repeats) == (" red", "stop", 0)
    assert reply.usage == {"completion_tokens": 2}
    assert reply.timings == {"ttft": 0.5}
    assert reply.ttft is not None
    assert reply.tpot is not None
    assert 0 < reply.ttft <= reply.ttft + reply.tpot <= reply.total
    assert reply.complete
    assert reply.terminal


def test_repeated_events_are_counted() -> None:
    reply = ask(events((0, chunk("a")), (0, chunk("a")), (1, chunk("b", "stop"))))
    assert reply.repeats == 1


def test_an_error_inside_a_stream_is_an_end_but_no_answer() -> None:
    error = json.dumps({"error": {"message": "gone", "code": "worker_failed"}})
    reply = ask(events((0, chunk("a")), (1, error)))
    assert (reply.error, reply.code) == ("gone", "worker_failed")
    assert reply.terminal
    assert not reply.complete


def test_a_stream_that_stops_is_lost() -> None:
    reply = ask(events((0, chunk("a"))))
    assert not reply.complete
    assert not reply.terminal


@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_keeps_its_code(stream: bool) -> None:
    body = {"error": {"message": "full", "code": "queue_full"}}
    reply = ask(lambda _: httpx.Response(429, json=body), stream=stream)
    assert (reply.status, reply.code, reply.error) == (429, "queue_full", "full")


def test_an_answer_that_is_no_json() -> None:
    reply = ask(lambda _: httpx.Response(502, text="<html>"), stream=False)
    assert (reply.status, reply.code) == (502, "502")


def test_a_dead_connection_is_lost() -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    reply = ask(refuse)
    assert (reply.status, reply.error) == (0, "ConnectError: refused")
    assert not reply.terminal


def test_what_is_sent() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        choice = {"message": {"content": "red"}, "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [choice]})

    png = b"\x89PNG\r\n\x1a\nrest"
    assert ask(answer, stream=False, images=(png, b"\xff\xd8\xff")).text == "red"
    body = json.loads(seen[0].content)
    parts = body["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    head, _, data = parts[0]["image_url"]["url"].partition(",")
    assert (head, base64.b64decode(data)) == ("data:image/png;base64", png)
    assert parts[1]["image_url"]["url"].startswith("data:image/jpeg;")
    assert body["max_tokens"] == 4
    assert seen[0].headers["authorization"] == f"Bearer {'k' * 16}"
    assert str(seen[0].url) == "http://x/v1/chat/completions"


def test_data_url_of_unknown_bytes_is_png() -> None:
    assert data_url(b"??").startswith("data:image/png;base64,")


def test_get_is_none_unless_it_is_a_json_object() -> None:
    answers = {
        "/a": httpx.Response(200, json={"x": 1}),
        "/b": httpx.Response(503, json={}),
        "/c": httpx.Response(200, text="no"),
        "/d": httpx.Response(200, json=[1]),
    }

    async def run() -> list[object]:
        transport = httpx.MockTransport(lambda request: answers[request.url.path])
        async with ChatClient("http://x", transport=transport) as client:
            return [await client.get(path) for path in answers]

    assert asyncio.run(run()) == [{"x": 1}, None, None, None]


def test_told_answers(capsys: pytest.CaptureFixture[str]) -> None:
    tell = ask_module._tell
    assert tell(Reply(text=" red", finish_reason="stop"), streamed=False, as_json=False) == 0
    assert capsys.readouterr().out == "red\n"
    assert tell(Reply(status=429, error="full", code="queue_full"), streamed=False, as_json=False)
    assert "full (queue_full)" in capsys.readouterr().err
    assert tell(Reply(text=" red", finish_reason="stop"), streamed=False, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["text"] == " red"


def test_pieces_are_printed_without_the_leading_space(capsys: pytest.CaptureFixture[str]) -> None:
    show = ask_module._printer()
    for piece in (" ", " a", " b", "c "):
        show(piece)
    assert capsys.readouterr().out == "a bc "
