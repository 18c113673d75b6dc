"""A refusal says what was wrong in words that reach the client, and leaves nothing held."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import time

import openai
import pytest
from PIL import Image

from epd.errors import RoleError
from epd_services.gateway.errors import envelope
from epd_services.gateway.fake import FakeDispatcher
from epd_services.gateway.settings import GatewaySettings


def asked(*urls, **fields):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": parts or "hi"}], **fields}


TEXTS = {
    "another model": (asked(model="gpt-4o"), 404, "That model is not served here"),
    "an http URL": (asked("http://example.com/a.png"), 400, "Image URLs are not fetched here"),
    "another scheme": (asked("ftp://example.com/a.png"), 400, "The image URL must be a data, http"),
    "no part": (
        {"messages": [{"role": "user", "content": []}]},
        400,
        "messages[0].content: List should have at least 1 item",
    ),
    "an image out of place": (
        {"messages": [{**asked("data:image/png;base64,AAAA")["messages"][0], "role": "system"}]},
        400,
        "the prompt holds 0 image placeholders for 1 images; the model's template leaves out",
    ),
    "seventeen stops": (asked(stop=["a"] * 17), 400, "stop: List should have at most 16 items"),
}


@pytest.mark.parametrize(("body", "status", "text"), TEXTS.values(), ids=TEXTS.keys())
def test_the_reason_reaches_the_client(gateway, body, status, text):
    answer = gateway.post(body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(text)


def test_a_model_that_is_not_here(gateway):
    error = gateway.get("/v1/models/gpt-4o").json()["error"]
    assert error["message"].startswith("That model is not served here")


def test_every_status_has_a_text_of_its_own():
    error = envelope(RoleError("one line\nand another"), "id")["error"]
    assert error["type"] == "conflict_error" and "\n" not in error["message"]


def test_an_image_beside_a_refused_one_takes_nothing_from_the_budget(gateway):
    buffer = io.BytesIO()
    Image.new("RGB", (2500, 2500)).save(buffer, "PNG")
    large = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    assert gateway.post(asked(large, "data:image/png;base64,%")).status_code == 400
    # the same picture again is decoded after the first one, whatever became of that
    gateway.say("ok")
    assert gateway.post(asked(large)).status_code == 200
    until = time.monotonic() + 5
    while (held := gateway.get("/v1/pipeline").json()["gateway"]["intake_bytes"]) and (
        time.monotonic() < until
    ):
        time.sleep(0.02)
    assert held == 0


def test_a_deadline_that_passed_is_not_retried_by_clients(start_gateway):
    gateway = start_gateway(FakeDispatcher(), request_seconds=0.2)
    gateway.say("too late", first_delay=5.0)
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=2)
    with client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**asked(), model="demo")
    assert caught.value.status_code == 408
    assert len(gateway.dispatcher.generations) == 1


def test_idle_connections_stay_for_those_that_reuse_them(start_gateway):
    gateway = start_gateway(FakeDispatcher(), idle_seconds=0.5)
    client = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=5)
    with contextlib.closing(client):
        for pause in (0.0, 0.25):
            time.sleep(pause)
            client.request("GET", "/live")
            assert client.getresponse().read() == b'{"status":"live"}'
        assert client.sock.recv(1) == b""
    assert GatewaySettings().idle_seconds > 60
