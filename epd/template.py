"""Rendering a chat template, which is a program out of a checkpoint, under bounds.

Jinja's immutable sandbox keeps a template from Python's internals. What it does not stop is waste:
nested loops, doubling strings, huge paddings. So every loop item, call and filter is counted
against a budget and a deadline, and every value is measured before it can be multiplied or printed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from threading import Lock
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from jinja2.parser import Parser

__all__ = ["ChatTemplate", "TemplateLimitError", "TemplateRefusedError"]

_FORBIDDEN_FILTERS = ("format", "center", "indent", "wordwrap", "pprint", "xmlattr", "urlize")
_FORBIDDEN_METHODS = ("format", "format_map", "center", "ljust", "rjust", "zfill", "expandtabs")


class TemplateLimitError(TemplateError):
    """The template ran too long or produced too much."""


class TemplateRefusedError(TemplateError):
    """The template itself called `raise_exception`."""


class ChatTemplate:
    """A compiled template. Raises `jinja2.TemplateError` or one of its subclasses.

    `max_chars` bounds the output and every value on the way; `max_steps` the loop items and calls;
    `max_seconds` the time, on `clock`.
    """

    def __init__(
        self,
        source: str,
        *,
        max_chars: int = 1 << 20,
        max_steps: int = 200_000,
        max_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = _Budget(max_chars, max_steps, max_seconds, clock)
        self._lock = Lock()
        self._budget.start()
        environment = _Environment(self._budget)
        tree = environment.parse(source)
        _instrument(tree)
        code = environment.compile(tree)
        self._template = environment.template_class.from_code(
            environment, code, environment.make_globals(None)
        )

    def render(self, values: Mapping[str, Any]) -> str:
        """The text of the template with `values` as its variables."""
        pieces: list[str] = []
        length = 0
        with self._lock:  # the budget belongs to one rendering at a time
            self._budget.start()
            for piece in self._template.generate(**values):
                pieces.append(piece)
                length += len(piece)
                if length > self._budget.max_chars:
                    raise TemplateLimitError("the template's output is too long")
        return "".join(pieces)


class _Budget:
    def __init__(
        self, max_chars: int, max_steps: int, max_seconds: float, clock: Callable[[], float]
    ) -> None:
        self.max_chars = max_chars
        self._max_steps, self._max_seconds, self._clock = max_steps, max_seconds, clock
        self._steps, self._deadline = 0, 0.0

    def start(self) -> None:
        self._steps, self._deadline = 0, self._clock() + self._max_seconds

    def step(self) -> None:
        self._steps += 1
        if self._steps > self._max_steps or self._clock() > self._deadline:
            raise TemplateLimitError("the template runs too long")

    def measured(self, value: Any) -> Any:
        """`value`, if the text it would make is within bounds."""
        if self._size(value, 0) > self.max_chars:
            raise TemplateLimitError("the template makes a value that is too long")
        return value

    def product(self, *values: Any) -> None:
        """Refuse operands that are too long, or whose sizes multiply beyond the bound."""
        total = 1
        for value in values:
            size = abs(value) if isinstance(value, int) else self._size(self.measured(value), 0)
            total *= max(size, 1)
            if total > 64 * self.max_chars:
                raise TemplateLimitError("the template multiplies values that are too long")

    def items(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.step()
            yield value

    def _size(self, value: Any, total: int) -> int:
        """Characters in `value`, or just more than the bound; shared parts count each time."""
        if isinstance(value, str | bytes | range):
            return total + len(value)
        if isinstance(value, dict):
            value = [part for item in value.items() for part in item]
        if isinstance(value, list | tuple | set):
            for item in value:
                total = self._size(item, total + 1)
                if total > self.max_chars:
                    break
        return total


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only groups them."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with every operation that can grow or repeat put under the budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, budget: _Budget) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.budget = budget
        self.filters = {
            name: self._bounded(function)
            for name, function in self.filters.items()
            if name not in _FORBIDDEN_FILTERS
        }
        self.filters |= {
            "tojson": self._bounded(_tojson), "_items": budget.items, "_measured": budget.measured
        }  # fmt: skip
        self.globals = {
            "range": self.globals["range"], "namespace": self.globals["namespace"],
            "dict": dict, "raise_exception": _raise, "strftime_now": _strftime_now,
        }  # fmt: skip

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` (a filter) as one step, with its arguments and result measured."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            # a lazy sequence has no size yet
            args = tuple(list(self.budget.items(a)) if isinstance(a, Iterator) else a for a in args)
            self.budget.product(*args, *kwargs.values())
            return self.budget.measured(function(*args, **kwargs))

        return run

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.budget.step()
        owner = getattr(__obj, "__self__", None)
        name = getattr(__obj, "__name__", "")
        if isinstance(owner, str | bytes) and name in _FORBIDDEN_METHODS:
            raise SecurityError(f"{name} is not available to templates")
        __self.budget.product(owner, *args, *kwargs.values())
        return __self.budget.measured(super().call(__context, __obj, *args, **kwargs))

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to attribute {attribute[:64]!r} is unsafe")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.step()
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("% formatting is not available to templates")
        if operator == "**":
            raise SecurityError("** is not available to templates")
        if operator == "*":
            self.budget.product(left, right)
        return self.budget.measured(super().call_binop(context, operator, left, right))


def _instrument(tree: nodes.Template) -> None:
    """Count the items of every loop; measure whatever is printed, joined by ~ or captured."""
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = _through("_items", loop.iter)
    for joined in list(tree.find_all(nodes.Concat)):
        joined.nodes = [_through("_measured", part) for part in joined.nodes]
    for output in list(tree.find_all(nodes.Output)):
        output.nodes = [
            part if isinstance(part, nodes.TemplateData) else _through("_measured", part)
            for part in output.nodes
        ]
    for block in list(tree.find_all(nodes.AssignBlock)):
        block.filter = _through("_measured", block.filter)


def _through(name: str, expression: Any) -> nodes.Filter:
    line = 1 if expression is None else expression.lineno
    return nodes.Filter(expression, name, [], [], None, None, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: nothing escaped for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str = "") -> None:
    raise TemplateRefusedError(str(message)[:200])


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form[:64])
