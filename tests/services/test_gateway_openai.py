"""The official client, streaming and not, against a real server."""

from __future__ import annotations

import json

import httpx
import openai
import pytest


def test_answer_whole(gateway, png_url):
    gateway.say("red circle and a blue square")
    content = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": png_url}},
    ]
    answer = gateway.openai().chat.completions.create(
        model="demo", messages=[{"role": "user", "content": content}], temperature=0, seed=5
    )
    assert answer.choices[0].message.content == "red circle and a blue square"
    assert answer.choices[0].finish_reason == "stop"
    submission = gateway.dispatcher.generations[-1].submission
    assert [(i.width, i.height) for i in submission.images] == [(8, 6)]
    assert submission.images[0].rgb == bytes((10, 200, 30)) * 48
    placeholder = gateway.formatter.card.image_token_id
    assert submission.prompt_token_ids.count(placeholder) == 1
    assert submission.sampling.seed == 5
    assert answer.usage.prompt_tokens == len(submission.prompt_token_ids) + 16
    assert answer.usage.completion_tokens == len(gateway.dispatcher.script.token_ids)
    assert answer.usage.prompt_tokens_details.image_tokens == 16
    timings = answer.model_extra["timings"]
    assert {"intake", "queue", "encode", "transfer", "prefill", "ttft", "total"} <= timings.keys()
    assert 0 < timings["ttft"] <= timings["total"]


def test_answer_streamed(gateway):
    gateway.say("a red circle, a blue square")
    stream = gateway.openai().chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "What?"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "a red circle, a blue square"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "stop"
    assert all(c.choices[0].finish_reason is None for c in chunks[:-2])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 1
    assert len({c.id for c in chunks}) == 1
    assert "total" in chunks[-1].model_extra["timings"]
    assert "total" in chunks[-2].model_extra["timings"]


def test_no_usage_chunk_unless_asked(gateway):
    gateway.say("yes")
    stream = gateway.openai().chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "What?"}], stream=True
    )
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_sse_form(gateway):
    gateway.say("one two three")
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    response = gateway.post(body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[0] == ": stream"
    assert events[-2:] == ["data: [DONE]", ""]
    ids = [int(e.split("\n")[0].removeprefix("id: ")) for e in events[1:-2]]
    assert ids == list(range(len(ids)))
    payloads = [json.loads(e.split("data: ", 1)[1]) for e in events[1:-2]]
    assert all(p["object"] == "chat.completion.chunk" for p in payloads)
    assert all(p["usage"] is None for p in payloads[:-1])


def test_several_images_keep_their_order(gateway, png_url):
    gateway.say("ok")
    from PIL import Image

    urls = [_solid_url(Image.new("RGB", (4, 4), (i, 0, 0))) for i in range(8)]
    content = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    gateway.openai().chat.completions.create(
        model="demo", messages=[{"role": "user", "content": [*content, _text("which?")]}]
    )
    images = gateway.dispatcher.generations[-1].submission.images
    assert [image.rgb[0] for image in images] == list(range(8))


def _solid_url(image):
    import base64
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _text(text):
    return {"type": "text", "text": text}


def test_multi_turn(gateway):
    gateway.say("blue")
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": [_text("Which colour?")]},
    ]
    answer = gateway.openai().chat.completions.create(model="demo", messages=messages)
    assert answer.choices[0].message.content == "blue"
    ids = gateway.dispatcher.generations[-1].submission.prompt_token_ids
    assert ids == gateway.formatter.tokenize(messages)


def test_stop_string_cuts_and_cancels(gateway):
    gateway.say("a red circle and a blue square", delay=0.002)
    answer = gateway.openai().chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "x"}], stop=["circle", "zzz"]
    )
    assert answer.choices[0].message.content == "a red "
    assert answer.choices[0].finish_reason == "stop"
    generation = gateway.dispatcher.generations[-1]
    assert generation.cancelled.is_set()
    assert generation.sent < len(gateway.dispatcher.script.token_ids)
    assert answer.usage.completion_tokens == generation.sent


def test_max_tokens_gives_length(gateway):
    gateway.say("a red circle and a blue square")
    answer = gateway.openai().chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "x"}], max_completion_tokens=3
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(gateway, stream):
    ids = gateway.formatter.tokenizer.encode("red", add_special_tokens=False).ids
    gateway.say("red star", top=((ids[0], -0.5), (ids[0] + 1, -float("inf"))))
    answer = gateway.openai().chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "x"}],
        logprobs=True,
        top_logprobs=2,
        stream=stream,
    )
    choices = [c.choices[0] for c in answer] if stream else answer.choices
    content = [entry for c in choices if c.logprobs for entry in c.logprobs.content]
    assert len(content) == len(gateway.dispatcher.script.token_ids)
    assert content[0].logprob == -0.5
    assert [t.logprob for t in content[0].top_logprobs] == [-0.5, -9999.0]
    assert bytes(b for entry in content for b in entry.bytes).decode().strip() == "red star"


def test_repeated_tokens_of_a_retry_are_dropped(gateway):
    gateway.say("a red circle", repeat=True)
    answer = gateway.openai().chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "x"}]
    )
    assert answer.choices[0].message.content == "a red circle"


def test_models(gateway):
    client = gateway.openai()
    (model,) = client.models.list().data
    assert model.id == "demo" and model.owned_by == "epd"
    assert client.models.retrieve("demo").model_extra["revision"] == gateway.formatter.card.revision
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such")


def test_errors_become_the_clients_typed_errors(gateway):
    client = gateway.openai()
    with pytest.raises(openai.NotFoundError) as wrong_model:
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "x"}])
    assert wrong_model.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "x"}], temperature=9
        )
    assert bad.value.param == "temperature"


def test_unknown_fields_are_named_in_a_header(gateway):
    gateway.say("ok")
    response = gateway.ask(verbosity="low", **{"bad name\r\n": 1, "a-b": None})
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "a-b, verbosity"


def test_request_id_is_echoed_and_not_used_inside(gateway):
    gateway.say("ok")
    body = {"messages": [{"role": "user", "content": "x"}]}
    for _ in range(2):
        response = gateway.post(body, headers={"X-Request-Id": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
    first, second = [g.submission.request_id for g in list(gateway.dispatcher.generations)[-2:]]
    assert first != second
    bad = gateway.post(body, headers={"X-Request-Id": "a b\tc"})
    assert bad.status_code == 400 and bad.json()["error"]["param"] == "X-Request-Id"


def test_salts(start_gateway, key_file):
    gateway = start_gateway(api_key_file=key_file)
    gateway.say("ok")

    def salt(key, **fields):
        body = {"messages": [{"role": "user", "content": "x"}], **fields}
        headers = {"Authorization": f"Bearer {key}"}
        assert gateway.post(body, headers=headers).status_code == 200
        return gateway.dispatcher.generations[-1].submission.salt

    alpha, bravo = "alpha-key-0123456789", "bravo-key-0123456789"
    salts = {salt(alpha), salt(bravo), salt(alpha, cache_salt="s"), salt(bravo, cache_salt="s")}
    assert len(salts) == 4 and "" not in salts
    assert salt(alpha) == salt(alpha)


def test_hundred_at_once(gateway):
    gateway.say("a red circle", first_delay=0.05)

    async def burst():
        async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=200)) as c:
            body = {"messages": [{"role": "user", "content": "x"}]}
            import asyncio

            return await asyncio.gather(
                *(c.post(f"{gateway.url}/v1/chat/completions", json=body) for _ in range(150))
            )

    import asyncio

    answers = asyncio.run(burst())
    texts = {a.json()["choices"][0]["message"]["content"] for a in answers}
    assert texts == {"a red circle"}
