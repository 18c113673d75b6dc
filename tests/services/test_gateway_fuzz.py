"""About a thousand generated requests: no 5xx, no hang, small error bodies, no echo."""

from __future__ import annotations

import json
import resource
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epd_services.gateway.fake import FakeDispatcher
from epd_services.gateway.schemas import ChatRequest

MARK = "zq-mark-zq"
BOUNDED = settings(
    max_examples=200, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(1 << 80), 1 << 80), st.floats(),
    st.text(max_size=20), st.just(MARK), st.sampled_from(["user", "text", "image_url", "data:"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "image_url", "url", MARK]), inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
parts = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=30) | scalars}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": values}),
    st.builds(
        lambda tail: {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{tail}"}},
        st.text("ABab01+/= -_", max_size=40),
    ),
    values,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant"]) | scalars,
         "content": st.text(max_size=30) | st.lists(parts, max_size=4) | values}
    ),
    max_size=4,
)  # fmt: skip
fields = st.sampled_from([*ChatRequest.model_fields, "tools", "response_format", MARK])
requests = st.builds(
    lambda body, extra: {**extra, **body},
    st.fixed_dictionaries({"messages": messages | values}),
    st.dictionaries(fields.filter(lambda name: name != "messages"), values, max_size=4),
)


@pytest.fixture(scope="module")
def target(start_gateway):
    gateway = start_gateway(FakeDispatcher(), request_seconds=5)
    gateway.say("ok")
    return gateway


def check(gateway, raw, headers=None):
    began = time.monotonic()
    response = gateway.post(raw, headers=headers or {})
    assert time.monotonic() - began < 5  # two seconds on an idle machine
    assert response.status_code in (200, 400, 404, 408, 413, 415), (response.status_code, raw)
    if response.status_code != 200:
        assert len(response.content) <= 2048
        assert MARK not in response.text
        assert response.json()["error"]["code"]


@BOUNDED
@given(requests)
def test_generated_objects(target, body):
    check(target, json.dumps(body).encode())


@settings(BOUNDED, max_examples=120)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda t: t.encode()))
def test_generated_bytes(target, raw):
    check(target, raw)


VALID = json.dumps(
    {"model": "demo", "stream": True, "temperature": 0.5, "stop": ["x"],
     "messages": [{"role": "user", "content": [{"type": "text", "text": "red?"}]}]}
).encode()  # fmt: skip


@settings(BOUNDED, max_examples=120)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4))
def test_mutated_bytes(target, changes):
    raw = bytearray(VALID)
    for position, byte in changes:
        raw[position] = byte
    check(target, bytes(raw))


names = st.sampled_from(
    ["X-Request-Id", "X-Request-Deadline-Ms", "Authorization", "Content-Encoding", "Accept"]
)


@settings(BOUNDED, max_examples=80)
@given(st.dictionaries(names, st.text(st.characters(codec="ascii", categories=["L", "N", "P"]))))
def test_generated_headers(target, headers):
    check(target, VALID, headers)


def test_schema_of_the_gateway_describes_what_it_accepts(target):
    """Bodies generated from our own OpenAPI document are answered, or refused in type."""
    import schemathesis

    schema = schemathesis.openapi.from_dict(target.get("/openapi.json").json())
    operation = schema["/v1/chat/completions"]["POST"]
    accepted = []

    @settings(BOUNDED, max_examples=60)
    @given(operation.as_strategy())
    def answered(case):
        raw = json.dumps(case.body if isinstance(case.body, dict) else {}).encode()
        check(target, raw)
        accepted.append(case)

    answered()
    assert accepted


def test_memory_stays_flat(target):
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    big = json.dumps({"messages": [{"role": "user", "content": [MARK * 20_000]}]}).encode()
    check(target, big)
    before = peak()
    for _ in range(40):
        check(target, big)
    assert peak() - before < 50 * 1024
