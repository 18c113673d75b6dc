"""Backends to run an op on, NaN-poisoned allocations with guards, and the error measure."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from epd_kernels.launch import INTERPRETED, triton

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_GUARD = 64
_SENTINEL = 77


@pytest.fixture(scope="session", autouse=True)
def interpreter_loops() -> None:
    """Let `range(n)` accept a loaded scalar: NumPy 2.4 refuses int() of a one-element array."""
    if not INTERPRETED:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index


@dataclass(frozen=True)
class Backend:
    """One way to run an op: its torch reference, its interpreted or its compiled kernel."""

    name: str
    device: str

    def op(self, module: str, name: str) -> Callable[..., Any]:
        suffix = "ref" if self.name == "ref" else "triton"
        return getattr(importlib.import_module(f"epd_kernels.{module}"), f"{name}_{suffix}")

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The interpreter's dot on raw bf16 operands is wrong, so bf16 is left to the others."""
        exact = [torch.float32, torch.float16]
        return exact if self.name == "interpreter" else [*exact, torch.bfloat16]


@pytest.fixture(params=["ref", "interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    name: str = request.param
    if name == "interpreter" and triton is None:
        pytest.skip("Triton is not installed")
    if name == "interpreter" and not INTERPRETED:
        if not torch.cuda.is_available():
            pytest.fail("Triton was imported before TRITON_INTERPRET was set")
        pytest.skip("kernels are compiled here")
    return Backend(name, _cuda() if name == "gpu" else "cpu")


@pytest.fixture
def gpu() -> Backend:
    return Backend("gpu", _cuda())


def _cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return "cuda"


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what the library allocates with NaN, between guards that must stay untouched."""
    guarded: list[torch.Tensor] = []
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        shape = empty(*size, device="meta", dtype=options.get("dtype")).shape
        buffer = empty(shape.numel() + 2 * _GUARD, **options)
        buffer.fill_(_SENTINEL)
        guarded.append(buffer)
        inner = buffer[_GUARD : _GUARD + shape.numel()]
        return inner.fill_(float("nan") if buffer.is_floating_point() else 113).view(shape)

    def new_empty(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        return poisoned(*size, **{"dtype": self.dtype, "device": self.device, **options})

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for buffer in guarded:
        guards = torch.cat((buffer[:_GUARD], buffer[-_GUARD:]))
        assert bool((guards == _SENTINEL).all()), "a kernel wrote outside its output"


@pytest.fixture
def assert_close() -> Callable[..., None]:
    return _assert_close


_RATIO = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _assert_close(
    actual: torch.Tensor, expected: torch.Tensor, *, ratio: float | None = None
) -> None:
    """Relative Frobenius error of `actual` against `expected`, by the dtype of `actual`.

    Or at most `ratio`.
    """
    assert actual.shape == expected.shape
    reference = expected.detach().double().cpu()
    error = (actual.detach().double().cpu() - reference).norm()
    bound = (ratio or _RATIO[actual.dtype]) * reference.norm() + 1e-30
    assert error <= bound, f"relative error {error / reference.norm():.2e}"


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """What the module's CHILD, a program that compiles without the interpreter, prints as JSON."""
    if triton is None:
        pytest.skip("Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    program = [sys.executable, request.module.CHILD]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
