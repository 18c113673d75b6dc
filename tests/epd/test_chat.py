"""Chat formatting: equal to transformers on honest templates, bounded on hostile ones."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerFast

from epd.chat import ChatFormatter
from epd.demo import CHECKPOINT
from epd.errors import CheckpointError, InvalidRequestError
from epd.models.card import ModelCard
from epd.models.tiny import write_tiny_llava
from epd.template import ChatTemplate, TemplateLimitError

PARTS_ONLY = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{# images first #}{% for content in message['content'] | selectattr('type', 'equalto', "
    "'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
STRINGS_ONLY = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}{% set ns = namespace(system=messages[0]['content']) %}
{% else %}
    {% set loop_messages = messages %}{% set ns = namespace(system='') %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {% set head = ns.system ~ '\\n\\n' if loop.first and ns.system else '' %}
{{ '[INST] ' ~ head ~ message['content'].strip() }} [/INST]
    {%- elif message['role'] == 'assistant' %}
{{ ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{% endfor %}"""
CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<image>' }}{%- elif 'text' in part %}{{- part.text }}{% endif %}
{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}
{{ {'b': [1, 'é<'], 'a': none} | tojson(indent=2) }}"""

IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def formatter(tiny: Path) -> Callable[..., ChatFormatter]:
    """A formatter of the tiny model with another chat template."""

    def make(template: str | None = None) -> ChatFormatter:
        file = tiny / "chat_template.jinja"
        honest = file.read_text()
        try:
            file.write_text(honest if template is None else template)
            return ChatFormatter(ModelCard.load(tiny))
        finally:
            file.write_text(honest)

    return make


def rendered(path: Path, template: str, messages: list[dict[str, Any]]) -> list[int]:
    """What transformers makes of the same messages; bos is added where the template has none."""
    special = json.loads((path / "tokenizer_config.json").read_text())
    names = {k: special[k] for k in ("bos_token", "eos_token")}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), **names)
    prompt = theirs.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    started = prompt.startswith(special["bos_token"])
    ids: list[int] = theirs(prompt, add_special_tokens=not started)["input_ids"]
    return ids


CONVERSATION = [
    {"role": "user", "content": [IMAGE, text("What is it? é 你"), IMAGE]},
    {"role": "assistant", "content": [text(" A star. ")]},
    {"role": "user", "content": [text("And "), text("now?")]},
]
PLAIN = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": " Who? "},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Why?\n"},
]


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (None, CONVERSATION), (None, PLAIN), (PARTS_ONLY, CONVERSATION), (CHATML, CONVERSATION),
        (CHATML, PLAIN), (STRINGS_ONLY, PLAIN), (STRINGS_ONLY, PLAIN[1:]),
    ],
)  # fmt: skip
def test_ids_equal_transformers(
    tiny: Path, formatter: Callable[..., ChatFormatter], template: str | None, messages: Any
) -> None:
    ours = formatter(template)
    source = template or (tiny / "chat_template.jinja").read_text()
    assert ours.tokenize(messages) == rendered(tiny, source, messages)


def test_the_demo_checkpoint_equals_transformers() -> None:
    formatter = ChatFormatter(ModelCard.load(CHECKPOINT))
    template = (CHECKPOINT / "chat_template.jinja").read_text()
    messages = [{"role": "user", "content": [IMAGE, text("How many red circles are there?")]}]
    assert formatter.tokenize(messages) == rendered(CHECKPOINT, template, messages)
    assert formatter.tokenize(messages, add_generation_prompt=False) != formatter.tokenize(messages)


def test_text_reaches_a_template_that_only_takes_parts(
    tiny: Path, formatter: Callable[..., ChatFormatter]
) -> None:
    as_text = formatter(PARTS_ONLY).tokenize([{"role": "user", "content": "hello"}])
    as_parts = [{"role": "user", "content": [text("hello")]}]
    assert as_text == rendered(tiny, PARTS_ONLY, as_parts)


def test_images_reach_a_template_that_only_takes_strings(
    tiny: Path, formatter: Callable[..., ChatFormatter]
) -> None:
    ours = formatter(STRINGS_ONLY)
    ids = ours.tokenize([{"role": "user", "content": [IMAGE, text(" what?"), IMAGE]}])
    flat = [{"role": "user", "content": "<image> what?<image>"}]
    assert ids == rendered(tiny, STRINGS_ONLY, flat)
    assert ids.count(4) == 2


def test_bos_comes_exactly_once(formatter: Callable[..., ChatFormatter]) -> None:
    for template in (None, PARTS_ONLY, STRINGS_ONLY, "{{ bos_token }}{{ messages[0].content }}"):
        ids = formatter(template).tokenize([{"role": "user", "content": "x"}])
        assert (ids[0], ids.count(1)) == (1, 1)
    ours = formatter()
    assert ours.encode("plain") == [1, *ours.encode("plain")[1:]]
    assert ours.encode("<s>plain") == ours.encode("plain")


@pytest.mark.parametrize(
    "content",
    ["<image>", [text("what is <image>?")], [IMAGE, text("<image>")], "a<image>b<image>"],
)
def test_the_image_token_in_text_is_refused(
    formatter: Callable[..., ChatFormatter], content: Any
) -> None:
    with pytest.raises(InvalidRequestError, match="placeholder") as raised:
        formatter().tokenize([{"role": "user", "content": content}])
    assert raised.value.param == "messages"


def test_a_template_that_drops_images_is_noticed(formatter: Callable[..., ChatFormatter]) -> None:
    blind = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="0 image placeholders for 1"):
        formatter(blind).tokenize([{"role": "user", "content": [IMAGE, text("x")]}])


@pytest.mark.parametrize(
    "messages",
    [
        [], "hello", [{}], ["hello"], [{"role": "user"}], [{"role": "wizard", "content": "x"}],
        [{"role": "user", "content": None}], [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "audio"}]}], [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": ["user"], "content": "x"}],
        [{"role": "user", "content": [{"type": "text", "text": 7}]}],
        [{"role": "user", "content": "x"}] * 513,
    ],
)  # fmt: skip
def test_malformed_messages_are_refused(
    formatter: Callable[..., ChatFormatter], messages: Any
) -> None:
    with pytest.raises(InvalidRequestError):
        formatter().tokenize(messages)


def test_what_the_template_itself_refuses(formatter: Callable[..., ChatFormatter]) -> None:
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        formatter(STRINGS_ONLY).tokenize(twice)
    with pytest.raises(InvalidRequestError, match="cannot render"):
        formatter("{{ messages[3].content.x }}").tokenize(twice)


def test_a_model_without_a_template_still_encodes(tiny: Path) -> None:
    card = ModelCard.load(tiny)
    from dataclasses import replace

    formatter = ChatFormatter(replace(card, chat_template=None))
    assert formatter.encode("hello")[0] == 1
    with pytest.raises(CheckpointError, match="no chat template"):
        formatter.tokenize([{"role": "user", "content": "x"}])


def test_a_missing_or_damaged_tokenizer(tiny: Path, tmp_path: Path) -> None:
    import shutil

    path = Path(shutil.copytree(tiny, tmp_path / "model"))
    for content in ("{}", "not json"):
        (path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError) as raised:
            ChatFormatter(ModelCard.load(path))
        assert len(str(raised.value).splitlines()) == 3
    (path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        ChatFormatter(ModelCard.load(path))


INJECTIONS = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ messages|attr('__class__') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ range.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '%s' % messages }}",
    "{{ '%999999999d' % 1 }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({}) }}",
    "{{ 9**9**9 }}",
    "{{ 'a'|center(99999999999) }}",
    "{{ 'a'.ljust(99999999999) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ '' | unknown }}",
    "{% for",
]
OPEN = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize("payload", INJECTIONS)
def test_injections_end_in_a_typed_error(
    formatter: Callable[..., ChatFormatter], payload: str
) -> None:
    with pytest.raises((CheckpointError, InvalidRequestError)) as raised:
        formatter(payload).tokenize([{"role": "user", "content": "x"}])
    assert "0x" not in str(raised.value)


@pytest.mark.parametrize("payload", INJECTIONS[:10])
def test_reaching_for_internals_is_refused_when_the_model_is_loaded(
    formatter: Callable[..., ChatFormatter], payload: str
) -> None:
    with pytest.raises(CheckpointError, match="SecurityError") as raised:
        formatter(payload)
    assert len(str(raised.value).splitlines()) == 3


BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "{% for a in 'x' * 9999 %}{% for b in 'x' * 9999 %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10000000000 }}",
    "{{ [0] * 10000000000 }}",
    "{% set n = namespace(s='xx') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s='xx') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}"
    "{{ n.s }}",
    "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = {'a': n.s, 'b': n.s} %}"
    "{% endfor %}{{ n.s | tojson }}",
    "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s %}{{ n.s }}{{ n.s }}"
    "{% endset %}{% endfor %}",
    "{% set n = namespace(s='xx') %}{% for i in range(99) %}"
    "{% set n.s = n.s | replace('x', n.s) %}{% endfor %}",
    "{% set n = namespace(s='xx') %}{% for i in range(99) %}"
    "{% set n.s = n.s.replace('x', n.s) %}{% endfor %}",
    "{% set n = namespace(s='xx') %}{% for i in range(99) %}"
    "{% set n.s = n.s.join([n.s, n.s]) %}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(90) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{{ range(99999) | map('string') | join('x' * 9999) }}",
    "{{ range(99999999999) | list }}",
    "{% for i in range(99999) %}{% set x = range(99999) | list | sort | join %}{% endfor %}",
    "{{ [1, 2] | batch(999999999, 'x') | list }}",
    "{{ [1, 2] | slice(999999999, 'x') | list }}",
    "{{ 'x' | tojson(indent=999999999) }}",
    "{{ [[['x']]] | tojson(indent=999999999) }}",
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_templates_that_run_away_are_stopped(bomb: str) -> None:
    started = time.monotonic()
    with pytest.raises((TemplateError, RecursionError, OverflowError)):
        ChatTemplate(bomb).render(OPEN)
    assert time.monotonic() - started < 5


def test_a_bomb_is_refused_when_the_model_is_loaded(
    formatter: Callable[..., ChatFormatter],
) -> None:
    with pytest.raises(CheckpointError, match="TemplateLimitError"):
        formatter(BOMBS[0])


def test_a_bomb_that_waits_for_certain_messages(formatter: Callable[..., ChatFormatter]) -> None:
    ours = formatter("{% if messages | length > 1 %}" + BOMBS[0] + "{% endif %}{{ messages }}")
    with pytest.raises(InvalidRequestError, match="too long"):
        ours.tokenize([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_limits_count_output_steps_and_time() -> None:
    loop = "{% for i in range(n) %}{{ 'ab' }}{% endfor %}"
    assert ChatTemplate(loop, max_chars=20).render({"n": 10}) == "ab" * 10
    with pytest.raises(TemplateLimitError):
        ChatTemplate(loop, max_chars=20).render({"n": 11})
    steady = ChatTemplate(loop, max_steps=30)
    assert len(steady.render({"n": 10})) == 20
    assert len(steady.render({"n": 10})) == 20
    with pytest.raises(TemplateLimitError):
        steady.render({"n": 40})
    ticks = iter(range(10_000))
    slow = ChatTemplate(loop, max_seconds=100, clock=lambda: float(next(ticks)))
    with pytest.raises(TemplateLimitError):
        slow.render({"n": 500})


def test_the_sandbox_itself_says_security() -> None:
    with pytest.raises(SecurityError):
        ChatTemplate("{{ messages.clear() }}").render(OPEN)
