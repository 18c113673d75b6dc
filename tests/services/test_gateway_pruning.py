"""The `pruning` field over HTTP: what reaches the pipeline, what is refused, what is reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from epd.demo import CHECKPOINT
from epd.errors import ConfigError
from epd.models.card import ModelCard
from epd.pruning_spec import PruningSpec
from epd_services.gateway.fake import FakeDispatcher
from epd_services.gateway.metrics import GatewayMetrics
from epd_services.gateway.settings import GatewaySettings
from epd_services.settings import load_settings

SCRIPT = {"method": "script", "keep": 0.25}


def parts(url: str, text: str = "what is it?") -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]


def submitted(gateway: Any) -> Any:
    return gateway.dispatcher.generations[-1].submission


def test_the_field_reaches_the_pipeline_with_the_questions(gateway: Any, png_url: str) -> None:
    gateway.say("yes")
    assert gateway.ask(parts(png_url), pruning=SCRIPT).status_code == 200
    assert submitted(gateway).pruning == PruningSpec(method="script", keep=0.25)
    assert submitted(gateway).queries == ["what is it?"]
    turns = [
        {"role": "user", "content": parts(png_url, "first?")},
        {"role": "assistant", "content": "yes"}, {"role": "user", "content": "second?"},
    ]  # fmt: skip
    for name, query in (("reselect", "second?"), ("sticky", "first?")):
        body = {"messages": turns, "pruning": SCRIPT | {"turns": name, "keep": 64}}
        assert gateway.post(body).status_code == 200
        assert submitted(gateway).queries == [query]
        assert submitted(gateway).pruning.keep == 64


def test_the_openai_client_sends_it_in_the_extra_body(gateway: Any, png_url: str) -> None:
    gateway.say("yes")
    with gateway.openai() as client:
        answer = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": parts(png_url)}],
            extra_body={"pruning": {"method": "script", "keep": 64}},
        )  # fmt: skip
    assert submitted(gateway).pruning == PruningSpec(method="script", keep=64)
    assert answer.usage.prompt_tokens_details.image_tokens_before == 0


def test_nothing_is_pruned_unasked_nor_without_images(gateway: Any, png_url: str) -> None:
    gateway.say("yes")
    for content, fields in (
        (parts(png_url), {}),
        (parts(png_url), {"pruning": None}),
        (parts(png_url), {"pruning": {"method": "none"}}),
        (parts(png_url), {"pruning": {"method": "script", "keep": 256}}),
        ("only text", {"pruning": SCRIPT}),
    ):
        assert gateway.ask(content, **fields).status_code == 200
        assert submitted(gateway).pruning is None
        assert submitted(gateway).queries == []


@pytest.mark.parametrize(
    ("pruning", "param", "allowed"),
    [
        ({"method": "magic", "keep": 4}, "pruning.method", "cdpruner"),
        ({"method": "script", "keep": 0}, "pruning.keep", "1 or more"),
        ({"method": "script", "keep": 257}, "pruning.keep", "[1, 256]"),
        ({"method": "script", "keep": 1.01}, "pruning.keep", "(0, 1]"),
        ({"method": "script"}, "pruning.keep", "1 or more"),
        ({"method": "adaptinfer", "keep": 64}, "pruning.method", "nothing inside the LLM"),
        (SCRIPT | {"positions": "keep+calibrate"}, "pruning.positions", "keep or renumber"),
        (SCRIPT | {"turns": "x"}, "pruning.turns", "sticky"),
        (SCRIPT | {"surprise": 1}, "pruning", "method, keep"),
        ("script", "pruning", "an object"),
        ([SCRIPT], "pruning", "an object"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_a_400_that_names_field_and_range(
    gateway: Any, png_url: str, pruning: Any, param: str, allowed: str, stream: bool
) -> None:
    before = gateway.dispatcher.submitted
    reply = gateway.ask(parts(png_url), pruning=pruning, stream=stream)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert allowed in error["message"]
    assert gateway.dispatcher.submitted == before


def test_a_deployments_default_and_clamp(start_gateway: Callable[..., Any], png_url: str) -> None:
    gateway = start_gateway(
        FakeDispatcher(), pruning=SCRIPT, pruning_min_keep=32, layer_pruning="fastv:1"
    )
    gateway.say("yes")

    def kept(**fields: Any) -> Any:
        assert gateway.ask(parts(png_url), **fields).status_code == 200
        return submitted(gateway).pruning

    assert kept() == PruningSpec(method="script", keep=0.25)
    assert kept(pruning={"method": "none"}) is None
    assert kept(pruning={"method": "dpp", "keep": 5}) == PruningSpec(method="dpp", keep=32)
    both = {"method": "script+fastv", "keep": 0.5, "layer_keep": 2}
    assert kept(pruning=both) == PruningSpec(method="script+fastv", keep=0.5, layer_keep=32)
    refused = gateway.ask(parts(png_url), pruning={"method": "adaptinfer", "keep": 64})
    assert refused.status_code == 400
    assert "only fastv" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"pruning": {"method": "magic", "keep": 4}}, "method must be one of"),
        ({"pruning": {"method": "script", "keep": 500}}, "keep must be a count in"),
        ({"pruning": {"method": "adaptinfer", "keep": 64}}, "adaptinfer is not served"),
    ],
)
def test_a_default_that_cannot_be_served_stops_the_start(
    fields: dict[str, Any], named: str
) -> None:
    card = ModelCard.load(CHECKPOINT)
    with pytest.raises(ConfigError, match=named):
        GatewaySettings(**fields).pruning_policy(card)


def test_settings_come_from_environment_and_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("EPD_PRUNING", '{"method": "script", "keep": 64}')
    monkeypatch.setenv("EPD_PRUNING_FLOOR", "1.0")
    monkeypatch.setenv("EPD_PRUNING_MIN_KEEP", "1")
    settings, origin = load_settings()
    assert (settings.pruning, origin["pruning"]) == ({"method": "script", "keep": 64}, "env")
    assert (settings.pruning_floor, type(settings.pruning_floor)) == (1.0, float)
    assert (settings.pruning_min_keep, type(settings.pruning_min_keep)) == (1, int)
    for name, text in settings.environment().items():
        monkeypatch.setenv(name, text)
    assert load_settings()[0].pruning == settings.pruning
    for name in ("EPD_PRUNING", "EPD_PRUNING_FLOOR", "EPD_PRUNING_MIN_KEEP"):
        monkeypatch.delenv(name)
    file = tmp_path / "epd.toml"
    file.write_text('[pruning]\nmethod = "dpp"\nkeep = 0.5\nparams = {}\n')
    settings, origin = load_settings(file)
    policy = settings.pruning_policy(ModelCard.load(CHECKPOINT))
    assert (policy.default, origin["pruning"]) == (PruningSpec(method="dpp", keep=0.5), "file")
    for text in ("0", "1.5", "-0.1", "many"):
        monkeypatch.setenv("EPD_PRUNING_FLOOR", text)
        with pytest.raises(ConfigError, match="pruning_floor"):
            load_settings()


def test_bytes_handed_on_are_a_metric_per_worker() -> None:
    workers = [{"name": "encode-0", "stages": "E", "handoff_bytes": 4096}, {"name": "other"}]
    metrics = GatewayMetrics("m", lambda: {"workers": workers})
    lines = metrics.exposition().decode().splitlines()
    assert 'epd_handoff_bytes_total{worker="encode-0"} 4096.0' in lines
    assert not any("other" in line and "handoff" in line for line in lines)
