"""The README does what it says: its shell and Python blocks run, its tables are those measured."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
SHELL = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
PYTHON = [b for b in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "from epd" in b]


def run(*command: str) -> str:
    environment = os.environ | {"BASH_ENV": "", "MAKEFLAGS": ""}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=170, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_there_is_something_to_run() -> None:
    assert len(SHELL) == 2
    assert len(PYTHON) == 1


@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="the blocks use the checkout's .venv")
def test_the_shell_blocks_run_in_order() -> None:
    said = run("bash", "-euo", "pipefail", "-c", SHELL[0])
    assert "10 of 10 right" in said or "9 of 10 right" in said
    said = run("bash", "-euo", "pipefail", "-c", SHELL[1])
    assert '"ready":true' in said
    assert re.search(r"^\s*\d+\s*$", said, re.MULTILINE), said


def test_the_python_block_answers() -> None:
    assert "Usage(" in run(sys.executable, "-c", PYTHON[0])


def test_the_tables_are_the_measured_ones() -> None:
    run(sys.executable, "docs/tables.py", "--check")
