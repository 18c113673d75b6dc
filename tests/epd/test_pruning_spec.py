"""What may be asked of pruning: every wrong field is named, with what is allowed, without torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd.errors import InvalidRequestError
from epd.pruning_policy import PruningPolicy, check_served, simplify
from epd.pruning_spec import PruningSpec, count_of
from epd.queries import QUERY_CHARS, image_queries
from epd_pruning.selection import keep_count

SCRIPT = {"method": "script", "keep": 0.25}


def refused(value: object) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        PruningSpec.parse(value)
    return caught.value


def test_a_spec_says_which_method_runs_where() -> None:
    both = PruningSpec.parse({"method": "script+adaptinfer", "keep": 64, "layer_keep": 32})
    assert (both.token_method, both.layer_method, both.layer_budget) == ("script", "adaptinfer", 32)
    inside = PruningSpec.parse({"method": "adaptinfer", "keep": 0.5})
    assert (inside.token_method, inside.layer_method, inside.layer_budget) == (
        None, "adaptinfer", 0.5,
    )  # fmt: skip
    before = PruningSpec.parse(SCRIPT)
    assert (before.layer_method, before.layer_budget) == (None, None)
    nothing = PruningSpec.parse({"method": "none"})
    assert (nothing.token_method, nothing.layer_method) == (None, None)
    assert PruningSpec.parse(before) is before


@pytest.mark.parametrize(
    ("value", "param", "allowed"),
    [
        ({"method": "magic", "keep": 4}, "pruning.method", "one of none, cdpruner"),
        ({"method": "script+magic", "keep": 4}, "pruning.method", "one of none"),
        ({"method": "script+script", "keep": 4}, "pruning.method", "joined by +"),
        ({"method": "", "keep": 4}, "pruning.method", "one of none"),
        ({"keep": 4}, "pruning.method", "name of a method"),
        ({"method": "script"}, "pruning.keep", "a count of 1 or more, or a share in (0, 1]"),
        ({"method": "script", "keep": 0}, "pruning.keep", "a count of 1 or more"),
        ({"method": "script", "keep": -3}, "pruning.keep", "a count of 1 or more"),
        ({"method": "script", "keep": 0.0}, "pruning.keep", "a share in (0, 1]"),
        ({"method": "script", "keep": 1.5}, "pruning.keep", "a share in (0, 1]"),
        ({"method": "script", "keep": float("nan")}, "pruning.keep", "a share in (0, 1]"),
        ({"method": "script", "keep": True}, "pruning.keep", "a count of 1 or more"),
        ({"method": "script", "keep": "64"}, "pruning.keep", "a count of 1 or more"),
        ({"method": "script", "keep": 1 << 21}, "pruning.keep", "a count of 1 or more"),
        (SCRIPT | {"layer_keep": 4}, "pruning.layer_keep", "where method joins two"),
        ({"method": "script+adaptinfer", "keep": 4}, "pruning.layer_keep", "joins two"),
        (SCRIPT | {"positions": "shuffle"}, "pruning.positions", "keep, renumber"),
        (SCRIPT | {"turns": "never"}, "pruning.turns", "reselect, sticky"),
        (SCRIPT | {"params": [1]}, "pruning.params", "an object"),
        (SCRIPT | {"params": {"tau": float("inf")}}, "pruning.params", "finite"),
        (SCRIPT | {"params": {"tau": "x" * 5000}}, "pruning.params", "4096 bytes"),
        (SCRIPT | {"params": {"tau": {"deep": 1}}}, "pruning.params", "plain"),
        ({"method": "adaptinfer", "keep": 4, "params": {"a": 1}}, "pruning.params", "before"),
        (SCRIPT | {"secret-field": 1}, "pruning", "method, keep, layer_keep"),
        ([], "pruning", "an object of method"),
        ("script", "pruning", "an object of method"),
        (None, "pruning", "an object of method"),
    ],
)
def test_a_bad_spec_is_refused_by_field_and_range(value: object, param: str, allowed: str) -> None:
    error = refused(value)
    assert error.param == param
    assert error.status == 400
    assert allowed in str(error)


def test_a_refusal_echoes_nothing() -> None:
    for value in (SCRIPT | {"hush": 1}, SCRIPT | {"positions": "hush"}, {"method": "hush"}):
        assert "hush" not in str(refused(value if "keep" in value else value | {"keep": 1}))


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"pool_factor": "big"}, "pruning.params.pool_factor"),
        ({"pool_factor": 0.5}, "pruning.params.pool_factor"),
        ({"wrong": 1}, "pruning.params.wrong"),
        ({"not a name": 1}, "pruning.params"),
    ],
)
def test_hyper_parameters_are_checked_where_torch_is(params: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        PruningSpec.parse(SCRIPT | {"params": params}).pruner()
    assert caught.value.param == param


def test_pruner_builds_the_method_that_was_asked_for() -> None:
    pruner = PruningSpec.parse(SCRIPT | {"params": {"pool_factor": 3}}).pruner()
    assert (pruner.name, pruner.pool_factor) == ("script", 3.0)  # type: ignore[union-attr]
    assert PruningSpec.parse({"method": "adaptinfer", "keep": 9}).pruner() is None


def test_the_fingerprint_is_of_what_the_encoder_hands_on() -> None:
    def mark(**fields: Any) -> str:
        return PruningSpec.parse(SCRIPT | fields).fingerprint()

    base = mark()
    assert mark(positions="renumber") == mark(turns="sticky") == base
    assert mark(params={"tau": 0.2, "gamma": 2.0}) == mark(params={"gamma": 2.0, "tau": 0.2})
    marks = {base, mark(keep=0.5), mark(keep=64), mark(params={"tau": 0.2}), mark(method="dpp")}
    assert len(marks) == 5
    both = mark(method="script+adaptinfer", layer_keep=9)
    assert both == base
    assert PruningSpec.parse({"method": "adaptinfer", "keep": 9}).fingerprint() == "none"


@given(st.integers(1, 3000), st.integers(1, 3000) | st.floats(0, 1, exclude_min=True, width=32))
def test_counts_are_those_of_the_pruning_room(num_tokens: int, keep: int | float) -> None:
    assert count_of(keep, num_tokens) == keep_count(num_tokens, keep)


def test_specs_survive_the_wire() -> None:
    spec = PruningSpec.parse(
        {"method": "script+adaptinfer", "keep": 0.5, "layer_keep": 9, "params": {"tau": [1, "a"]}}
    )
    packed = msgspec.msgpack.encode(spec)
    assert msgspec.msgpack.decode(packed, type=PruningSpec) == spec
    one = PruningSpec.parse({"method": "dpp", "keep": 1})
    all_ = PruningSpec.parse({"method": "dpp", "keep": 1.0})
    for spec in (one, all_):
        back = msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=PruningSpec)
        assert type(back.keep) is type(spec.keep)


# the policy of a deployment


def policy(**fields: Any) -> PruningPolicy:
    return PruningPolicy(image_tokens=256, **fields)


def test_a_request_that_does_not_ask_gets_the_default() -> None:
    default = PruningSpec.parse(SCRIPT)
    assert policy().resolve(None) is None
    assert policy(default=default).resolve(None) == default
    assert policy(default=default).resolve({"method": "none"}) is None
    other = {"method": "dpp", "keep": 9}
    assert policy(default=default).resolve(other) == PruningSpec.parse(other)


@pytest.mark.parametrize(
    ("asked", "param", "allowed"),
    [
        ({"method": "script", "keep": 257}, "pruning.keep", "[1, 256]"),
        ({"method": "script+fastv", "keep": 9, "layer_keep": 300}, "pruning.layer_keep", "256]"),
        ({"method": "adaptinfer", "keep": 9}, "pruning.method", "inside the LLM only fastv"),
        (SCRIPT | {"positions": "keep+calibrate"}, "pruning.positions", "keep or renumber"),
    ],
)
def test_what_a_server_cannot_do_is_refused(asked: object, param: str, allowed: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        policy(layer_method="fastv").resolve(asked)
    assert caught.value.param == param
    assert allowed in str(caught.value)


def test_a_server_without_layer_pruning_says_so() -> None:
    with pytest.raises(InvalidRequestError, match="nothing inside the LLM"):
        check_served(PruningSpec.parse({"method": "fastv", "keep": 9}), None)


@pytest.mark.parametrize("keep", [256, 1.0, 0.999, 1000])
def test_a_budget_of_the_whole_image_is_no_pruning(keep: int | float) -> None:
    spec = PruningSpec.parse({"method": "script", "keep": keep, "params": {"tau": 0.2}})
    assert simplify(spec, 256) is None
    both = {"method": "script+fastv", "keep": keep, "layer_keep": 9, "params": {"tau": 0.2}}
    assert simplify(PruningSpec.parse(both), 256) == PruningSpec(method="fastv", keep=9)
    assert simplify(PruningSpec.parse(SCRIPT), 256) == PruningSpec.parse(SCRIPT)


def test_budgets_below_the_clamp_are_raised_to_it() -> None:
    clamped = policy(min_keep=0.125, layer_method="fastv")

    def kept(**fields: Any) -> tuple[Any, Any]:
        spec = clamped.resolve(fields)
        assert spec is not None
        return spec.keep, spec.layer_keep

    assert kept(method="script", keep=8) == (32, None)
    assert kept(method="script", keep=0.01) == (32, None)
    assert kept(method="script", keep=32) == (32, None)
    assert kept(method="script", keep=0.5) == (0.5, None)
    assert kept(method="script+fastv", keep=64, layer_keep=4) == (64, 32)
    assert policy(min_keep=256).resolve(SCRIPT) is None


def test_budgets_fall_linearly_to_the_floor_as_load_grows() -> None:
    spec = PruningSpec(method="script", keep=128)
    knob = policy(floor=0.25)
    assert [knob.budget(spec, load) for load in (0.0, 0.25, 0.5, 1.0, 7.0)] == [
        None, 112, 96, 64, 64,
    ]  # fmt: skip
    assert knob.budget(PruningSpec(method="script", keep=32), 1.0) is None
    assert policy().budget(spec, 1.0) is None
    assert knob.budget(PruningSpec(method="fastv", keep=128), 1.0) is None


# which question goes with which image


def turn(role: str, *parts: str) -> dict[str, Any]:
    shaped = [{"type": "image"} if p == "#" else {"type": "text", "text": p} for p in parts]
    return {"role": role, "content": shaped}


def test_queries_follow_the_turns() -> None:
    talk = [
        {"role": "system", "content": "be brief"}, turn("user", "#", "what is it?", "#"),
        turn("assistant", "a cat"), turn("user", "and", "#", "here?"),
        turn("assistant", "a dog"), {"role": "user", "content": "which is  older?"},
    ]  # fmt: skip
    assert image_queries(talk, "reselect") == ["which is older?"] * 3
    assert image_queries(talk, "sticky") == ["what is it?", "what is it?", "and here?"]
    assert image_queries(talk[:2], "reselect") == ["what is it?"] * 2
    assert image_queries([turn("user", "#")], "sticky") == [""]
    assert image_queries([{"role": "user", "content": "no image"}], "reselect") == []
    long = image_queries([turn("user", "#", "x" * (QUERY_CHARS + 5))], "reselect")
    assert long == ["x" * QUERY_CHARS]


def test_nothing_here_imports_torch() -> None:
    program = (
        "import sys, epd.pruning_spec, epd.pruning_policy, epd.queries, epd.messages\n"
        "from epd_services.gateway.settings import GatewaySettings\n"
        "import epd.models.card\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
