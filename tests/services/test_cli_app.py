"""The command line as a person meets it: exit codes, three lines, origins, nothing heavy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from epd.demo import CHECKPOINT
from epd_services.cli.app import app
from epd_services.stack import free_port

HEAVY = ("torch", "transformers", "fastapi", "pydantic", "pydantic_settings", "uvicorn", "httpx")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EPD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CI", "1")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str) -> str:
    """What a command that cannot start says; checks its form and its exit code."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert [line[:6] for line in lines] == ["error:", "  why:", " next:"], result.stderr
    return result.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['epd', '--help']\n"
        "from epd_services.cli.app import app\n"
        "try: app()\nexcept SystemExit: pass\n"
        f"print('heavy:', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "heavy: []"
    for command in ("serve", "worker", "gateway", "ask", "doctor", "config", "admin", "bench"):
        assert f" {command} " in out.stdout


def test_missing_model() -> None:
    said = refused("serve", "no/such/directory/here", "--port", str(free_port()))
    assert "no/such/directory/here" in said


def test_pickled_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((CHECKPOINT / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02never opened")
    assert "pickle" in refused("serve", str(tmp_path), "--port", str(free_port()))


def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused("serve", "--port", str(port))
    assert f"port {port}" in said
    assert "already in use" in said
    suggested = int(said.rsplit("--port ", 1)[1])
    assert suggested > port


@pytest.mark.parametrize("topology", ["1X", "1E1P", "E1P1D", "", "0E1P1D", "1EE1P1D"])
def test_wrong_topology(topology: str) -> None:
    said = refused("serve", "--topology", topology, "--port", str(free_port()))
    assert "topology" in said
    assert "epd serve --topology 1E1P1D" in said


@pytest.mark.parametrize("letters", ["X", "EE", "", "EPDX"])
def test_unknown_role_letters(letters: str) -> None:
    assert "letters out of E, P and D" in refused("worker", "--roles", letters)


@pytest.mark.parametrize("command", [("worker", "--roles", "E"), ("gateway",)])
def test_services_say_which_address_they_lack(command: tuple[str, ...]) -> None:
    """In a process of their own, as they configure its logs."""
    program = [sys.executable, "-m", "epd_services.cli.app", *command]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "  why: " in done.stderr
    assert "EPD_BIND" in done.stderr
    assert "Traceback" not in done.stderr


def test_unreachable_cache_is_an_error_when_asked_for() -> None:
    url = f"redis://user:secret-word@127.0.0.1:{free_port()}"
    said = refused("serve", "--cache-url", url, "--port", str(free_port()))
    assert "token cache" in said
    assert "secret-word" not in said


def test_unknown_scheme_of_cache_url() -> None:
    assert "redis://" in refused("serve", "--cache-url", "http://x", "--port", str(free_port()))


def test_unknown_key_in_toml(tmp_path: Path) -> None:
    file = tmp_path / "epd.toml"
    file.write_text("topologie = '1EPD'\n")
    assert "'topologie'" in refused("serve", "--config", str(file))
    assert "'topologie'" in refused("config", "validate", str(file))
    assert "'topologie'" in refused("config", "show", "--config", str(file))


@pytest.mark.parametrize(
    ("text", "word"),
    [("port = 0", "port"), ("port = ", "cannot read"), ("topology = '9'", "topology")],
)
def test_unsound_toml(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "epd.toml"
    file.write_text(text)
    assert word in refused("config", "validate", str(file))


def test_sound_toml(tmp_path: Path) -> None:
    file = tmp_path / "epd.toml"
    file.write_text("port = 9000\ntopology = '2E1PD'\n")
    result = run("config", "validate", str(file), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"valid": True, "sets": ["port", "topology"]}
    assert "port, topology" in run("config", "validate", str(file)).stdout


def test_config_show_tells_origins_and_hides_passwords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "epd.toml"
    file.write_text("port = 9000\ntopology = '1EPD'\n")
    monkeypatch.setenv("EPD_TOPOLOGY", "2E1PD")
    monkeypatch.setenv("EPD_CACHE_URL", "redis://me:hunter2@10.0.0.1:6379/0")
    result = run("config", "show", "--json", "--config", str(file))
    shown = json.loads(result.stdout)
    assert shown["port"] == {"value": 9000, "origin": "file"}
    assert shown["topology"] == {"value": "2E1PD", "origin": "env"}
    assert shown["host"] == {"value": "127.0.0.1", "origin": "default"}
    assert shown["cache_url"] == {"value": "redis://me:***@10.0.0.1:6379/0", "origin": "env"}
    table = run("config", "show", "--config", str(file)).stdout
    assert "hunter2" not in result.stdout + table
    assert "2E1PD" in table


def test_ask_needs_pictures_that_exist_and_a_question(tmp_path: Path) -> None:
    assert "no such file" in refused("ask", str(tmp_path / "none.png"), "What is this?").lower()
    picture = tmp_path / "a.png"
    picture.write_bytes(b"x")
    assert "without a question" in refused("ask", str(picture))


def test_ask_a_server_that_is_not_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert url in refused("ask", "Hello?", "--url", url)
    assert url in CliRunner(env={"EPD_URL": url}).invoke(app, ["ask", "Hello?"]).stderr


def test_offline_bench_wants_to_hear_that_weights_are_random(tmp_path: Path) -> None:
    assert "--random-weights" in refused("bench", "--offline", str(tmp_path))


def test_bench_refuses_what_only_the_offline_one_measures() -> None:
    said = refused("bench", "--pruning", "{}", "--kv", "int4")
    assert "--kv, --pruning without --offline" in said


def test_offline_bench_says_what_pruning_looks_like(tmp_path: Path) -> None:
    said = refused("bench", "--offline", str(tmp_path), "--random-weights", "--pruning", "script")
    assert "not JSON" in said and '{"method":"dpp","keep":64}' in said


def test_bench_rates_must_be_numbers() -> None:
    assert "rates" in refused("bench", "--rates", "2,fast")


def test_what_nobody_foresaw_ends_with_one() -> None:
    code = (
        "import sys; sys.argv = ['epd', 'config', 'show']\n"
        "import epd_services.cli.app as a\n"
        "def broken(*_): raise RuntimeError('surprise')\n"
        "a.lazy = broken\na.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RuntimeError: surprise" in done.stderr
    assert "Traceback" not in done.stderr
