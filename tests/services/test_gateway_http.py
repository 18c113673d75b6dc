"""Everything malformed gets a typed 4xx that repeats nothing; every route is guarded."""

from __future__ import annotations

import gzip
import json
import re
import socket
import subprocess
import sys
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from epd.errors import ConfigError, UnavailableError
from epd_services.gateway.auth import ApiKeys
from epd_services.gateway.fake import FakeDispatcher
from epd_services.gateway.schemas import parse_chat_request

OPEN = {"/", "/live", "/ready", "/health"}
ROUTES = {
    *OPEN,
    "/metrics",
    "/openapi.json",
    "/v1/chat/completions",
    "/v1/models",
    "/v1/models/{model:path}",
    "/v1/pipeline",
}
CANARY = "canary-5f0c9d"


def check_error(response, status=None, param=None):
    """The one envelope, small, with nothing private in it."""
    assert response.headers["content-type"] == "application/json"
    assert len(response.content) <= 2048
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    assert response.json().keys() == {"error"}
    for private in (
        r"0x[0-9a-f]{4,}",
        r"/(home|usr|tmp|root|work)\b",
        CANARY,
        "Traceback",
        "pydantic",
    ):
        assert not re.search(private, response.text), response.text
    if status is not None:
        assert response.status_code == status, response.text
    if param is not None:
        assert error["param"] == param
    return error


def text(content="hi", **fields):
    return {"messages": [{"role": "user", "content": content}], **fields}


def image(url):
    return text([{"type": "image_url", "image_url": {"url": url}}])


NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
           "frequency_penalty", "max_tokens", "max_completion_tokens", "n", "top_logprobs",
           "timeout", "seed"]  # fmt: skip


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", '"1"', "1e30", "-1e30", "true", "[]", "{}"]
)
def test_numbers_are_bounded_and_strict(gateway, field, value):
    raw = json.dumps(text()).removesuffix("}") + f', "{field}": {value}}}'
    gateway.say("ok")
    check_error(gateway.post(raw.encode()), 400, field)


BAD_BODIES = {
    "empty": b"",
    "not json": b"hello",
    "truncated": b'{"messages": [',
    "array": b"[]",
    "null": b"null",
    "string": b'"messages"',
    "number": b"1e999",
    "not utf-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "utf-16": json.dumps(text()).encode("utf-16"),
    "lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "deep": b'{"messages": ' + b"[" * 100_000,
    "deep extra": b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "nan": b'{"messages": NaN}',
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bad_bodies(gateway, body):
    check_error(gateway.post(body), 400)


PART = {"type": "text", "text": "x"}
BAD_FIELDS = {
    "no messages": ({}, "messages"),
    "no message": ({"messages": []}, "messages"),
    "513 messages": ({"messages": [{"role": "user", "content": "x"}] * 513}, "messages"),
    "role": ({"messages": [{"role": CANARY, "content": "x"}]}, "messages[0].role"),
    "tool role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "null content": (text(None), "messages[0].content"),
    "number content": (text(7), "messages[0].content"),
    "no part": (text([]), "messages[0].content"),
    "129 parts": (text([PART] * 129), "messages[0].content"),
    "part type": (text([PART, {"type": CANARY}]), "messages[0].content[1]"),
    "part without type": (text([{"text": "x"}]), "messages[0].content[0]"),
    "part text": (text([{"type": "text", "text": 5}]), "messages[0].content[0].text"),
    "image without url": (
        text([{"type": "image_url", "image_url": {}}]),
        "messages[0].content[0].image_url.url",
    ),
    "detail": (
        text([{"type": "image_url", "image_url": {"url": "data:", "detail": CANARY}}]),
        "messages[0].content[0].image_url.detail",
    ),
    "audio part": (text([{"type": "input_audio", "input_audio": {}}]), "messages[0].content[0]"),
    "seventeen stops": (text(stop=["a"] * 17), "stop"),
    "empty stop": (text(stop=""), "stop"),
    "long stop": (text(stop=CANARY * 50), "stop"),
    "stop of numbers": (text(stop=[1]), "stop[0]"),
    "stream": (text(stream="yes"), "stream"),
    "stream options alone": (text(stream_options={"include_usage": True}), "stream_options"),
    "top_logprobs alone": (text(top_logprobs=2), "top_logprobs"),
    "model": (text(model=CANARY), "model"),
    "huge model": (text(model=CANARY * 99), "model"),
    "salt": (text(cache_salt="s" * 257), "cache_salt"),
    "placeholder in text": (text(f"<image> {CANARY}"), "messages"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "param"), BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_bad_fields_are_named(gateway, body, param):
    status = 404 if param == "model" and len(body["model"]) < 99 else 400
    check_error(gateway.post(body), status, param)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tools", [{"type": "function"}]), ("tool_choice", "required"), ("functions", [{}]),
     ("response_format", {"type": "json_object"}), ("logit_bias", {"5": 1}), ("n", 2),
     ("modalities", ["audio"]), ("chat_template", "{{ 1 }}"), ("guided_json", {}),
     ("image_embeds", "AAAA"), ("lora_path", "/x"), ("kv_transfer_params", {"host": "x"}),
     ("mm_processor_kwargs", {"max_pixels": 1}), ("best_of", 4)],
)  # fmt: skip
def test_unsupported_fields_are_refused_by_name(gateway, field, value):
    check_error(gateway.post(text(**{field: value})), 400, field)


def test_fields_that_ask_for_nothing_pass(gateway):
    gateway.say("ok")
    body = text(tools=[], tool_choice="none", response_format={"type": "text"}, logit_bias={},
                n=1, logprobs=False, stop=None, user="u", seed=-5, top_k=-1)  # fmt: skip
    assert gateway.post(body).status_code == 200


BAD_URLS = [
    "", "x", "data:", "data:,hi", "data:image/png,AAAA", "data:image/png;base64,",
    "data:image/png;base64,A", "data:image/png;base64,AAAA AAAA", "data:image/png;base64,AA==AA==",
    "data:image/png;base64,_-_-", "data:image/png;charset=utf-8;base64,AAAA",
    "data:text/html;base64,AAAA", "data:image/svg+xml;base64,AAAA", "data:image/png;base64,é",
    "file:///etc/passwd", "file://localhost/etc/passwd", "ftp://example.com/a.png", "//x/y",
    "http://example.com/a.png", "https://example.com/a.png", "javascript:alert(1)", "/etc/passwd",
    "DATA:IMAGE/PNG;BASE64,AAAA",
]  # fmt: skip


@pytest.mark.parametrize("url", BAD_URLS)
@pytest.mark.parametrize("shape", ["object", "string"])
def test_bad_image_urls(gateway, url, shape):
    body = image(url)
    if shape == "string":
        body["messages"][0]["content"][0]["image_url"] = url
    error = check_error(gateway.post(body), 400)
    assert error["code"] == "invalid_media"
    assert "passwd" not in error["message"]


def test_wrong_mime_is_judged_by_the_bytes(gateway, png_url):
    gateway.say("ok")
    assert gateway.post(image(png_url.replace("image/png", "image/webp"))).status_code == 200


def test_nine_images(gateway, png_url):
    part = {"type": "image_url", "image_url": png_url}
    error = check_error(gateway.post(text([part] * 9)), 400, "messages")
    assert "at most 8" in error["message"]


def test_a_damaged_image_is_a_bad_request_and_service_goes_on(gateway, png_url):
    gateway.say("ok")
    check_error(gateway.post(image(png_url[:-40])), 400)
    assert gateway.post(image(png_url)).status_code == 200


def test_long_prompts(start_gateway):
    gateway = start_gateway(max_prompt_chars=1000)
    error = check_error(gateway.post(text("a" * 1001)), 400, "messages")
    assert error["message"] == "The prompt is too long."
    wide = start_gateway()
    error = check_error(wide.post(text("red circle " * 20_000)), 400, "messages")
    assert "context" in error["message"]


def test_five_megabytes_of_rubbish_get_a_short_answer(gateway):
    body = json.dumps({"messages": CANARY * 400_000}).encode()
    check_error(gateway.post(body), 400, "messages")


@pytest.mark.parametrize("declared", [True, False])
def test_body_limit(start_gateway, declared):
    gateway = start_gateway(max_body_bytes=100_000)
    body = json.dumps(text("a" * 200_000)).encode()

    def pieces():
        for i in range(0, len(body), 8192):
            yield body[i : i + 8192]

    headers = {"content-type": "application/json"}
    content = body if declared else pieces()
    response = gateway.http.post("/v1/chat/completions", content=content, headers=headers)
    assert check_error(response, 413)["code"] == "body_too_large"
    assert gateway.post(text()).status_code in (200, 400)


def test_budget_of_all_bodies_together(start_gateway):
    gateway = start_gateway(intake_bytes=1 << 20)
    error = check_error(gateway.post(text("a" * (2 << 20))), 429)
    assert error["code"] == "queue_full"
    pipeline = gateway.get("/v1/pipeline").json()
    assert pipeline["gateway"]["intake_bytes"] == 0


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded",
     "application/xml", "application/json-seq"],
)  # fmt: skip
def test_content_types(gateway, kind):
    headers = {} if kind is None else {"content-type": kind}
    began = time.monotonic()
    response = gateway.http.post("/v1/chat/completions", content=b"{}", headers=headers)
    check_error(response, 415)
    assert time.monotonic() - began < 1


def test_charset_is_fine_and_compression_is_not(gateway):
    gateway.say("ok")
    raw = json.dumps(text()).encode()
    fine = gateway.post(raw, headers={"content-type": "Application/JSON; charset=utf-8"})
    assert fine.status_code == 200
    check_error(gateway.post(gzip.compress(raw), headers={"content-encoding": "gzip"}), 415)


def test_header_limits(start_gateway):
    gateway = start_gateway(max_header_bytes=10_000)
    check_error(gateway.post(text(), headers={f"x-{i}": "1" for i in range(120)}), 400)
    check_error(gateway.post(text(), headers={"x-long": "a" * 9_000, "y": "b" * 900}), 400)
    endless = b"GET /live HTTP/1.1\r\nx: " + b"a" * 300_000
    assert raw_exchange(gateway, endless).startswith(b"HTTP/1.1 400")


def test_slow_body_is_a_timeout(start_gateway):
    gateway = start_gateway(body_seconds=0.2)
    client = socket.create_connection(("127.0.0.1", gateway.port), timeout=5)
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{"
    )
    assert client.recv(4096).startswith(b"HTTP/1.1 408")
    client.close()


@pytest.mark.parametrize("sent", [b"", b"GET /live HTT", b"GET /live HTTP/1.1\r\nHost: x\r\nX: "])
def test_slow_heads_are_cut(start_gateway, sent):
    gateway = start_gateway(head_seconds=0.2)
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as client:
        client.sendall(sent)
        began = time.monotonic()
        assert closed(client)
        assert time.monotonic() - began < 2


def closed(client):
    try:
        return client.recv(100) == b""
    except ConnectionResetError:
        return True


def test_a_slow_second_head_is_cut_and_a_slow_answer_is_not(start_gateway):
    gateway = start_gateway(head_seconds=0.2)
    gateway.say("ok", first_delay=0.6)
    assert gateway.post(text()).status_code == 200
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as client:
        client.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while b"live" not in answer:
            answer += client.recv(4096)
        client.sendall(b"GET /live HT")
        assert closed(client)


def test_connections_are_bounded(start_gateway):
    gateway = start_gateway(max_connections=20)
    clients = [socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(20)]
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as extra:
        assert closed(extra)
    for client in clients:
        client.close()
    time.sleep(0.1)
    assert gateway.get("/live").status_code == 200


def raw_exchange(gateway, data):
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as client:
        client.sendall(data)
        return client.recv(65536)


@pytest.mark.parametrize(
    "data",
    [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
     b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
     b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
     b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
     b"GET /live HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
     b"GET /live HTTP/1.1\r\n\xff\xfe: x\r\n\r\n"],
    ids=range(7),
)  # fmt: skip
def test_raw_rubbish_never_gives_a_5xx(gateway, data):
    answer = raw_exchange(gateway, data)
    assert not answer.startswith(b"HTTP/1.1 5")
    assert gateway.get("/live").status_code == 200


# routes and keys


def app_of(gateway):
    return gateway.server.config.app


def served_routes(gateway):
    return {route.path: route.methods for route in app_of(gateway).routes}


def test_the_routes_are_exactly_these(gateway):
    assert set(served_routes(gateway)) == ROUTES


@pytest.fixture(scope="module")
def locked(start_gateway, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("alpha-key-0123456789\n")
    gateway = start_gateway(api_key_file=path)
    gateway.say("ok")
    return gateway


def concrete(path):
    return path.replace("{model:path}", "demo")


@pytest.mark.parametrize("path", sorted(ROUTES))
@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong-key-0123456789", "alpha-key-0123456789",
     "Basic alpha-key-0123456789", "Bearer alpha-key-012345678", "Bearer alpha-key-01234567890",
     "bearer ALPHA-KEY-0123456789"],
)  # fmt: skip
def test_every_route_without_the_right_key(locked, path, header):
    headers = {} if header is None else {"authorization": header}
    for method in served_routes(locked)[path]:
        response = locked.http.request(method, concrete(path), headers=headers)
        if path in OPEN:
            assert response.status_code == 200
        else:
            assert check_error(response, 401)["code"] == "unauthorized"
            assert response.headers["www-authenticate"] == "Bearer"


def test_every_route_with_the_right_key(locked):
    headers = {"authorization": "Bearer alpha-key-0123456789"}
    for path, methods in served_routes(locked).items():
        for method in methods:
            body = {"json": text()} if method == "POST" else {}
            response = locked.http.request(method, concrete(path), headers=headers, **body)
            assert response.status_code == 200, path


@pytest.mark.parametrize(
    "path", ["//v1/models", "/v1/models/", "/V1/models", "/v1/%6dodels", "/v1/../v1/models",
             "/live/../v1/models", "/v1/models?x=/live", "/live/v1/models", "/admin", "/docs",
             "/pause", "/v1/completions"],
)  # fmt: skip
@pytest.mark.parametrize("host", ["x", "x/live?", "live", "127.0.0.1:1/live#"])
def test_paths_and_hosts_are_no_way_around_the_key(locked, path, host):
    answer = raw_exchange(
        locked, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    )
    assert answer.split()[1] in (b"401", b"404", b"400")


def test_unknown_routes_and_methods(gateway):
    def get(method, path):
        return gateway.http.request(method, path)

    check_error(get("GET", f"/{CANARY}"), 404)
    check_error(get("GET", "/v1/chat/completions"), 405)
    check_error(get("DELETE", "/v1/models"), 405)


def test_key_files(tmp_path):
    path = tmp_path / "keys"
    with pytest.raises(ConfigError):
        ApiKeys.load(path)
    for bad in ("", "# nothing\n", "short\n", "k" * 16 + "\nshort\n"):
        path.write_text(bad)
        with pytest.raises(ConfigError):
            ApiKeys.load(path)


# health, metrics, page


def test_health_follows_the_dispatcher(start_gateway):
    gateway = start_gateway(FakeDispatcher())
    assert gateway.dispatcher.started

    def get(path):
        return gateway.get(path)

    assert [get(p).status_code for p in ("/live", "/ready", "/health")] == [200, 200, 200]
    gateway.dispatcher.is_ready = False
    assert [get(p).status_code for p in ("/live", "/ready", "/health")] == [200, 503, 503]
    assert check_error(get("/ready"))["message"] == "no worker hosts the decode stage"
    assert get("/ready").headers["retry-after"] == "1"
    error = check_error(gateway.post(text()), 503)
    assert error["code"] == "unavailable"
    gateway.stop()
    assert not gateway.dispatcher.started


def test_metrics(start_gateway, png_url):
    gateway = start_gateway(FakeDispatcher(image_tokens=4))
    gateway.say("a red circle", delay=0.002)
    for _ in range(3):
        assert gateway.post(image(png_url)).status_code == 200
    gateway.post(b"{")
    page = gateway.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=")
    families = {f.name: f for f in text_string_to_metric_families(page.text)}
    samples = {
        (s.name, *sorted(s.labels.items())): s.value for f in families.values() for s in f.samples
    }
    label = ("model_name", "demo")
    tokens = len(gateway.dispatcher.script.token_ids)
    assert samples["vllm:generation_tokens_total", label] == 3 * tokens
    assert samples["vllm:time_to_first_token_seconds_count", label] == 3
    assert samples["vllm:inter_token_latency_seconds_count", label] == 3 * (tokens - 1)
    assert samples["vllm:request_success_total", ("finished_reason", "stop"), label] == 3
    assert samples["vllm:request_prefill_time_seconds_sum", label] == pytest.approx(0.09)
    assert samples["vllm:mm_cache_queries_total", label] == 4
    assert samples["vllm:num_requests_running", label] == 0
    assert samples["epd_image_decodes_total", ("outcome", "ok")] == 3
    assert samples["epd_errors_total", ("code", "invalid_request")] == 1
    assert samples["epd_worker_up", ("stages", "E"), ("worker", "e-0")] == 1
    route = ("handler", "/v1/chat/completions")
    assert samples["http_requests_total", route, ("method", "POST"), ("status", "200")] == 3
    assert {"vllm:e2e_request_latency_seconds", "vllm:request_prompt_tokens",
            "vllm:request_queue_time_seconds", "vllm:num_requests_waiting",
            "vllm:request_max_num_generation_tokens", "http_request_duration_seconds",
            "epd_stage_seconds"} <= set(families)  # fmt: skip


def test_pipeline_is_the_dispatchers_report(gateway):
    report = gateway.get("/v1/pipeline").json()
    assert [w["stages"] for w in report["workers"]] == ["E", "P", "D"]
    assert report["gateway"]["intake_bytes"] == 0


def test_openapi_resolves(gateway):
    document = gateway.get("/openapi.json").json()
    assert set(document["paths"]) == {"/v1/models/{model}" if "model:" in p else p for p in ROUTES}
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references and references <= set(document["components"]["schemas"])


def test_page_needs_nothing_from_elsewhere(gateway):
    page = gateway.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page.text)


def test_nothing_of_a_request_reaches_the_log(gateway, log_lines, png_url):
    gateway.say("ok")
    key = f"Bearer {CANARY}-key"
    bad = [text(CANARY), text(CANARY, model=CANARY), text(f"<image>{CANARY}"), image(CANARY),
           {CANARY: CANARY}]  # fmt: skip
    for body in bad:
        gateway.post(body, headers={"authorization": key, "x-other": CANARY})
    gateway.say("x", error=RuntimeError("boom"), fail_after=0)
    gateway.post(image(png_url), headers={"x-request-id": "seen-1"})
    gateway.get(f"/{CANARY}?{CANARY}")
    logged = "\n".join(log_lines)
    assert '"request_id": "seen-1"' in logged and "boom" in logged
    assert CANARY not in logged and "base64" not in logged
    metrics = gateway.get("/metrics").text
    assert CANARY not in metrics


def test_private_texts_of_errors_stay_inside(start_gateway):
    gateway = start_gateway(FakeDispatcher())
    for message in ("at 0x7f00deadbeef", "see /home/x/y", "tcp://10.0.0.1:5", "a\nb", "x" * 400):
        gateway.dispatcher.refuse = UnavailableError(message)
        error = check_error(gateway.post(text()), 503)
        assert error["message"].startswith("The service cannot take")
    gateway.dispatcher.refuse = ConfigError("secret plan")
    assert check_error(gateway.post(text()), 500)["message"] == "Internal error."


def test_the_gateway_imports_no_torch():
    code = (
        "import sys, epd_services.gateway.app, epd_services.gateway.fake;"
        "print([m for m in ('torch', 'transformers', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sampling_defaults_and_seeds():
    request = parse_chat_request(json.dumps(text()).encode())
    first = request.sampling(max_tokens=7, temperature=0.5)
    second = request.sampling(max_tokens=7, temperature=0.5)
    assert first.max_tokens == 7 and first.temperature == 0.5 and first.logprobs is None
    assert first.seed != second.seed
    fixed = parse_chat_request(json.dumps(text(seed=-1, temperature=0)).encode())
    params = fixed.sampling(max_tokens=7, temperature=0.5)
    assert params.seed == (1 << 63) - 1 and params.temperature == 0
