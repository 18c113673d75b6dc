"""Starting a stack: what is checked, what is said, and how a process that dies is explained."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from pathlib import Path

import pytest

from epd.demo import CHECKPOINT
from epd.errors import ConfigError
from epd.models.card import ModelCard
from epd_services import supervisor as supervisor_module
from epd_services.cli import serve as serve_module
from epd_services.cli.terminal import three_lines
from epd_services.settings import Settings, load_settings
from epd_services.stack import Stack, first_api_key, free_port, port_problem
from epd_services.stack import _reason as reason
from epd_services.supervisor import ProcessPlan, Supervisor, _Child


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EPD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CI", "1")


def settings_in(directory: Path, **flags: object) -> Settings:
    return load_settings(run_dir=directory, cache_url="memory://", port=free_port(), **flags)[0]


def test_port_problem() -> None:
    port = free_port()
    assert port_problem("127.0.0.1", port) is None
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert "in use" in str(port_problem("127.0.0.1", port))
    assert port_problem("host.invalid", port) is not None


def test_the_url_is_one_that_a_browser_can_open(tmp_path: Path) -> None:
    hosts = {"127.0.0.1": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}
    for host, shown in hosts.items():
        stack = Stack(settings_in(tmp_path, host=host))
        assert stack.url == f"http://{shown}:{stack.settings.port}"


def test_first_api_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# mine\n\n0123456789abcdef\nother\n")
    assert first_api_key(file) == "0123456789abcdef"
    assert first_api_key(None) is None
    assert first_api_key(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "Its log is empty."),
        ("one\ntwo\n", "two"),
        ("error: Cannot load.\n  why: It has no config.json.\n next: epd doctor\n",
         "It has no config.json."),
        (json.dumps({"event": "a stage broke", "error": "boom", "level": "error"}),
         "a stage broke boom"),
    ],
)  # fmt: skip
def test_the_reason_in_a_log(tmp_path: Path, text: str, expected: str) -> None:
    log = tmp_path / "x.log"
    log.write_text(text)
    assert reason(log) == expected
    assert reason(tmp_path / "none.log") == "It left no log."


def test_a_worker_that_cannot_start_ends_the_start(tmp_path: Path) -> None:
    """A device that this machine lacks is found by the worker, and told by the stack."""
    stack = Stack(settings_in(tmp_path, topology="1EPD", device="bogus"))

    async def run() -> None:
        async with stack:
            pass

    with pytest.raises(ConfigError) as caught:
        asyncio.run(run())
    said = three_lines(caught.value)
    assert "epd-0 did not start" in said
    assert "bogus" in said
    assert str(tmp_path) in said
    assert all(pid is None for pid in stack.supervisor.children.values())
    assert (tmp_path / "epd-0.log").is_file()


def test_a_server_on_all_interfaces_needs_keys_or_a_permission(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="without API keys"):
        serve_module.preflight(settings_in(tmp_path, host="0.0.0.0"))
    serve_module.preflight(settings_in(tmp_path, host="0.0.0.0", allow_open_http=True))
    assert "anybody" in capsys.readouterr().err
    serve_module.preflight(settings_in(tmp_path))
    assert capsys.readouterr().err == ""


def test_what_serve_announces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "api keys"
    keys.write_text("0123456789abcdef\n")
    stack = Stack(settings_in(tmp_path, api_key_file=keys, topology="1e1e1pd"))
    serve_module._announce(stack, ModelCard.load(CHECKPOINT))
    said = capsys.readouterr().out
    assert stack.url in said
    assert "2E1PD" in said
    assert f"{tmp_path}/*.log" in said
    curl = next(line for line in said.splitlines() if "curl" in line)
    assert len(curl.replace(str(tmp_path), "")) < 240
    assert f"grep -m1 '^[^#]' '{keys}'" in curl
    body = json.loads((tmp_path / "request.json").read_text())
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png")


def test_stop_before_ready_is_noticed() -> None:
    async def run(stop_first: bool) -> bool:
        stop, task = asyncio.Event(), asyncio.create_task(asyncio.sleep(0 if not stop_first else 9))
        if stop_first:
            stop.set()
        ended = await serve_module._before(stop, task)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return ended

    assert asyncio.run(run(True)) is False
    assert asyncio.run(run(False)) is True


def test_a_process_that_is_started_again_during_the_stop_ends_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        supervisor = Supervisor(settings_in(tmp_path, drain_seconds=1.0))
        child = _Child(ProcessPlan("w", ["sleep", "60"], {}))
        supervisor._children.append(child)
        launch = supervisor._launch
        await launch(child)

        async def slowly(child: _Child) -> None:
            await asyncio.sleep(0.2)
            await launch(child)

        monkeypatch.setattr(supervisor, "_launch", slowly)
        supervisor._watchers.append(asyncio.create_task(supervisor._watch(child)))
        assert child.process is not None
        child.process.kill()
        await asyncio.sleep(0.1)
        try:
            async with asyncio.timeout(5):
                await supervisor.stop()
        finally:
            supervisor.kill()
        assert child.process.returncode is not None

    asyncio.run(scenario())


def test_a_process_that_keeps_failing_is_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_WINDOW", 0.5)

    async def scenario() -> None:
        supervisor = Supervisor(settings_in(tmp_path, drain_seconds=1.0))
        child = _Child(ProcessPlan("w", ["false"], {}))
        supervisor._children.append(child)
        launches: list[float] = []
        launch = supervisor._launch

        async def counted(child: _Child) -> None:
            launches.append(asyncio.get_running_loop().time())
            await launch(child)

        monkeypatch.setattr(supervisor, "_launch", counted)
        await counted(child)
        supervisor._watchers.append(asyncio.create_task(supervisor._watch(child)))
        async with asyncio.timeout(10):
            while len(launches) < 5:
                await asyncio.sleep(0.01)
        assert supervisor.failed == ["w"]
        assert launches[4] - launches[3] >= 0.45
        async with asyncio.timeout(0.4):
            await supervisor.stop()

    asyncio.run(scenario())
