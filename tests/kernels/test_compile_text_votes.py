"""The kernels of pruning inside the decoder compile for compute capability 9.0 without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from epd_kernels.launch import triton

CHILD = Path(__file__).with_name("compile_text_votes.py")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if triton is None:
        pytest.skip("Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, CHILD], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_spills(compiled):
    assert {name: r["spills"] for name, r in compiled.items() if r["spills"]} == {}


def test_the_map_is_made_on_wgmma(compiled):
    made = {name: r for name, r in compiled.items() if name not in ("rank", "gather")}
    assert len(made) == 21
    assert [name for name, r in made.items() if r["mma"] or not r["wgmma"]] == []
