"""What a deployment relies on: open ports refused, missing secrets named, health that is true."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from epd.cache.factory import open_cache
from epd.errors import ConfigError
from epd.roles import StageSet
from epd.transport import reachable
from epd_services.cli.app import app
from epd_services.cli.terminal import three_lines
from epd_services.health import problem
from epd_services.settings import Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "gateway", ""])
def test_an_open_port_needs_keys_or_a_permission(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(host=host).check_http()
    said = three_lines(caught.value).splitlines()
    assert len(said) == 3
    assert host in said[0]
    assert "EPD_API_KEY_FILE" in said[2] and "EPD_ALLOW_OPEN_HTTP" in said[2]
    Settings(host=host, allow_open_http=True).check_http()
    Settings(host=host, api_key_file=tmp_path / "keys").check_http()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_a_loopback_port_needs_nothing(host: str) -> None:
    Settings(host=host).check_http()


def test_the_gateway_refuses_an_open_port_with_exit_code_2() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EPD_")}
    done = subprocess.run(
        [sys.executable, "-m", "epd_services.cli.app", "gateway", "--host", "0.0.0.0"],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: Cannot listen on 0.0.0.0 without API keys.")
    assert len(done.stderr.splitlines()) == 3


def test_a_worker_without_a_name_takes_its_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes the replicas of a scaled service differ."""
    told: list[str] = []

    def run_worker(settings: Settings, name: str, stages: StageSet) -> int:
        told.append(name)
        return 0

    monkeypatch.setattr("epd_services.worker_process.run_worker", run_worker)
    for host in ("3f2a91c0d4e5", "77aa01b2c3d4"):
        monkeypatch.setattr("os.uname", lambda host=host: SimpleNamespace(nodename=host))
        assert CliRunner().invoke(app, ["worker", "--roles", "E"]).exit_code == 0
    assert told == ["e-3f2a91c0d4e5", "e-77aa01b2c3d4"]


def test_missing_secrets_are_named(tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.touch()
    for path in (missing, empty):
        with pytest.raises(ConfigError, match=str(path)):
            Settings(wire_key_file=path).wire_key()
        with pytest.raises(ConfigError, match=str(path)):
            open_cache(f"redis://redis:6379?password_file={path}")


@pytest.mark.parametrize(
    ("bound", "told"),
    [
        ("tcp://0.0.0.0:5600", "tcp://encoder-1:5600"),
        ("tcp://[::]:5600", "tcp://encoder-1:5600"),
        ("tcp://*:5600", "tcp://encoder-1:5600"),
        ("tcp://10.1.2.3:5600", "tcp://10.1.2.3:5600"),
        ("ipc:///run/epd/a.sock", "ipc:///run/epd/a.sock"),
    ],
)
def test_an_inbox_on_every_interface_is_told_by_host_name(bound: str, told: str) -> None:
    assert reachable(bound, "encoder-1") == told


def test_a_file_touched_long_ago_or_never_is_unhealthy(tmp_path: Path) -> None:
    file = tmp_path / "alive"
    assert problem(str(file)) == f"{file}: No such file or directory"
    file.touch()
    assert problem(str(file)) is None
    then = time.time() - 60
    os.utime(file, (then, then))
    assert problem(str(file)) == f"{file} is 60 s old"


def test_only_an_answer_of_200_is_healthy() -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/ready" else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert problem(f"{url}/ready") is None
        assert problem(f"{url}/else") == f"{url}/else answers 503"
        server.shutdown()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}/ready"
        assert "refused" in str(problem(closed))


def test_the_health_command_ends_with_the_verdict(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "epd_services.health", str(tmp_path / "alive")]
    sick = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (sick.returncode, "alive" in sick.stderr) == (1, True)
    (tmp_path / "alive").touch()
    assert subprocess.run(command, capture_output=True, timeout=30).returncode == 0
