"""Streams under stress: disconnects, deadlines, keep-alives, errors midway, clients that stall."""

from __future__ import annotations

import json
import re
import socket
import time

import pytest

from epd.errors import DeadlineError, UnavailableError, WorkerFailedError
from epd.request import FinishReason
from epd_services.gateway.fake import FakeDispatcher, Script

LONG = Script(token_ids=tuple([5] * 5000), delay=0.01)


@pytest.fixture(scope="module")
def brisk(start_gateway):
    """A gateway with short waits."""
    return start_gateway(
        FakeDispatcher(), keepalive_seconds=0.1, stream_buffer_bytes=4096, stall_seconds=0.5
    )


def connect(gateway, body, **headers):
    raw = json.dumps(body).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(raw)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    client = socket.create_connection(("127.0.0.1", gateway.port), timeout=10)
    client.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + raw)
    return client


def question(**fields):
    return {"messages": [{"role": "user", "content": "x"}], **fields}


def wait_for(condition, seconds=5.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def submitted(gateway, count):
    wait_for(lambda: gateway.dispatcher.submitted > count)
    return gateway.dispatcher.generations[-1]


def metric(gateway, line):
    text = gateway.get("/metrics").text
    found = re.search(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_disconnect_cancels(brisk, stream, started):
    brisk.dispatcher.script = LONG if started else Script(token_ids=(5,), first_delay=60)
    count, gone = brisk.dispatcher.submitted, 'epd_cancelled_total{reason="disconnect"}'
    before = metric(brisk, gone)
    client = connect(brisk, question(stream=stream, max_tokens=5000))
    generation = submitted(brisk, count)
    if started:
        wait_for(lambda: generation.sent > 2)
    assert not generation.cancelled.is_set()
    client.close()
    wait_for(generation.cancelled.is_set, 1.0)
    wait_for(lambda: metric(brisk, gone) == before + 1)
    sent = generation.sent
    time.sleep(0.1)
    assert generation.sent <= sent + 1
    assert metric(brisk, 'vllm:num_requests_running{model_name="demo"}') == 0
    assert metric(brisk, 'vllm:num_requests_waiting{model_name="demo"}') == 0


def test_disconnect_while_the_body_is_sent_submits_nothing(brisk):
    count = brisk.dispatcher.submitted
    client = socket.create_connection(("127.0.0.1", brisk.port))
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n{"
    )
    time.sleep(0.1)
    client.close()
    time.sleep(0.2)
    assert brisk.dispatcher.submitted == count
    wait_for(lambda: brisk_budget(brisk) == 0)


def brisk_budget(gateway):
    return gateway.get("/v1/pipeline").json()["gateway"]["intake_bytes"]


def test_first_comment_comes_at_once_and_then_keep_alives(brisk):
    brisk.dispatcher.script = Script(token_ids=(5,), first_delay=0.35)
    began = time.monotonic()
    client = connect(brisk, question(stream=True), Connection="close")
    data = b""
    while b": stream\n\n" not in data:
        data += client.recv(4096)
    assert time.monotonic() - began < 0.3
    while chunk := client.recv(4096):
        data += chunk
    client.close()
    assert 2 <= data.count(b": keep-alive\n\n") <= 4
    assert data.index(b": keep-alive") < data.index(b"data: {")
    assert b"data: [DONE]\n\n" in data


def stream_text(gateway, body, **headers):
    return gateway.post(body, headers=headers).text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WorkerFailedError("all attempts failed"), "worker_failed"),
        (UnavailableError("no worker hosts the decode stage"), "unavailable"),
        (DeadlineError("too late"), "deadline_exceeded"),
        (RuntimeError("secret at 0x7f0000001234"), "internal_error"),
    ],
)
@pytest.mark.parametrize("after", [0, 3])
def test_an_error_in_a_stream_is_an_event_and_no_done(gateway, error, code, after):
    gateway.say("a red circle and a blue square", fail_after=after, error=error)
    text = stream_text(gateway, question(stream=True), **{"X-Request-Id": "r-7"})
    events = [e for e in text.split("\n\n") if "data: " in e]
    last = json.loads(events[-1].split("data: ", 1)[1])
    assert last["error"]["code"] == code and last["error"]["request_id"] == "r-7"
    assert len(events) == after + 1
    assert "[DONE]" not in text and "secret" not in text and "0x" not in text


@pytest.mark.parametrize(
    ("error", "status"),
    [(WorkerFailedError("failed"), 503), (DeadlineError("late"), 408), (RuntimeError("x"), 500)],
)
def test_an_error_of_a_whole_answer_is_a_status(gateway, error, status):
    gateway.say("a red circle", fail_after=2, error=error)
    response = gateway.ask()
    assert response.status_code == status
    assert ("retry-after" in response.headers) == (status == 503)
    assert "choices" not in response.json()


def test_an_aborted_generation_is_unavailable(gateway):
    gateway.say("a red circle", finish_reason=FinishReason.ABORT)
    assert gateway.ask().status_code == 503


class Gappy(FakeDispatcher):
    """Loses the second token of every answer."""

    def submit(self, submission):
        return self._without_second(super().submit(submission))

    class _Answer:
        def __init__(self, inner):
            self.inner = inner
            self.cancel = inner.cancel

        async def __aiter__(self):
            async for event in self.inner:
                if event.tokens[0].index != 1:
                    yield event

    _without_second = staticmethod(_Answer)


def test_a_missing_token_is_an_error(start_gateway):
    gateway = start_gateway(Gappy())
    gateway.say("one two three four")
    assert gateway.ask().status_code == 500
    assert gateway.dispatcher.generations[-1].cancelled.is_set()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["field", "header"])
def test_deadline(gateway, stream, where):
    gateway.dispatcher.script = LONG
    body = question(stream=stream, max_tokens=5000)
    headers = {}
    if where == "field":
        body["timeout"] = 0.3
    else:
        headers["X-Request-Deadline-Ms"] = "300"
    began = time.monotonic()
    response = gateway.post(body, headers=headers)
    assert 0.25 < time.monotonic() - began < 0.9
    assert response.status_code == (200 if stream else 408)
    assert "deadline_exceeded" in response.text and "[DONE]" not in response.text
    generation = gateway.dispatcher.generations[-1]
    wait_for(generation.cancelled.is_set)
    assert 0 < generation.submission.timeout_s <= 0.3


def test_a_client_cannot_raise_its_deadline(start_gateway):
    gateway = start_gateway(request_seconds=0.2)
    gateway.dispatcher.script = LONG
    response = gateway.post(question(timeout=1000), headers={"X-Request-Deadline-Ms": "900000"})
    assert response.status_code == 408


def test_one_millisecond(gateway, png_url):
    gateway.say("ok", first_delay=5)
    content = [{"type": "image_url", "image_url": {"url": png_url}}]
    began = time.monotonic()
    assert gateway.ask(content, timeout=0.001).status_code == 408
    assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "1e3", "NaN", "9" * 9, "٣"])
def test_bad_deadline_header(gateway, value):
    headers = [(b"X-Request-Deadline-Ms", value.encode())]
    response = gateway.post(json.dumps(question()).encode(), headers=dict_of(headers))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-Request-Deadline-Ms"


def dict_of(headers):
    return {name.decode(): value for name, value in headers}


def test_a_stalled_reader_is_cut_and_cancelled(brisk):
    brisk.dispatcher.script = Script(token_ids=tuple([5] * 200_000), per_event=20)
    count = brisk.dispatcher.submitted
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    client.connect(("127.0.0.1", brisk.port))
    raw = json.dumps(question(stream=True, max_tokens=200_000, logprobs=True)).encode()
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw)
    )
    generation = submitted(brisk, count)
    wait_for(generation.cancelled.is_set, 20)
    assert metric(brisk, 'epd_cancelled_total{reason="slow_consumer"}') >= 1
    # what is left in the socket ends without the end mark
    data = b""
    client.settimeout(5)
    while chunk := client.recv(1 << 16):
        data += chunk
    client.close()
    assert b"[DONE]" not in data and data.count(b"data: ") < 10_000


def test_a_burst_of_ready_events_is_no_stall(brisk):
    brisk.dispatcher.script = Script(token_ids=tuple([5] * 2000))
    text = brisk.post(question(stream=True, max_tokens=2000)).text
    assert text.count("data: {") == 2000 and text.endswith("data: [DONE]\n\n")


def test_others_are_served_beside_stalled_readers(brisk):
    script = Script(token_ids=tuple([5] * 20_000), per_event=20)
    clients = []
    for _ in range(20):
        brisk.dispatcher.script = script
        count = brisk.dispatcher.submitted
        clients.append(connect(brisk, question(stream=True, max_tokens=20_000)))
        submitted(brisk, count)
    brisk.say("a red circle")
    began = time.monotonic()
    assert brisk.ask().status_code == 200
    assert time.monotonic() - began < 3
    for client in clients:
        client.close()


def test_shed_while_full_has_retry_after(start_gateway):
    gateway = start_gateway(FakeDispatcher(capacity=3, retry_after=2.4))
    gateway.say("ok")
    answers = [gateway.ask(stream=stream) for stream in (False, True, False, True, False)]
    assert [a.status_code for a in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].headers["retry-after"] == "3"
    assert answers[-1].json()["error"] == {
        "message": "the encode queue is full",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
        "request_id": answers[-1].headers["x-request-id"],
    }
    assert metric(gateway, 'epd_shed_total{reason="queue_full"}') == 2
