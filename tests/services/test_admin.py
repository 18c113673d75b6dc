"""The admin API and `epd admin` in front of a real gateway core with scripted workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from epd.cache.base import CachedTokens
from epd.cache.memory import MemoryCache
from epd.errors import ConfigError
from epd.membership import Membership
from epd.node import GATEWAY, Identity, Node
from epd.transport import InMemoryTransport
from epd.wire import Codec
from epd_services.admin.endpoint import Endpoint, announce, find, make_token, read_token
from epd_services.admin.server import admin_server
from epd_services.cli.app import app
from epd_services.gateway.dispatcher import PipelineDispatcher
from epd_services.gateway.fake_worker import FakeWorker
from epd_services.settings import load_settings
from epd_services.stack import free_port

CREW = {"e-0": "E", "p-0": "P", "d-0": "D", "d-1": "D", "d-2": "D", "d-3": "D"}
ROUTES = [
    ("GET", "status"), ("GET", "history"), ("GET", "switches/x"), ("GET", "cache"),
    ("POST", "workers/d-0/switch"), ("POST", "workers/d-0/drain"),
    ("POST", "workers/d-0/resume"), ("POST", "cache/flush"), ("GET", "nothing"),
]  # fmt: skip


class Service:
    """A gateway core, its admin API and its workers, on a thread of their own."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.url = ""
        self.cache = MemoryCache()
        self.workers: dict[str, FakeWorker] = {}
        self.dispatcher: PipelineDispatcher
        self._ready = threading.Event()
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        network: dict[str, Any] = {}
        node = Node(Identity(GATEWAY, 5), InMemoryTransport(GATEWAY, network), Codec())
        members = Membership("r", time.monotonic, dead_after=5.0)
        self.dispatcher = PipelineDispatcher(node, members, self.cache, clock=time.monotonic)
        await self.dispatcher.start()
        self.workers = {n: FakeWorker(network, n, s, seconds=0.125) for n, s in CREW.items()}
        tasks = [asyncio.create_task(w.follow()) for w in self.workers.values()]
        settings, _ = load_settings(run_dir=self.run_dir)
        async with admin_server(settings, self.dispatcher) as self.url:
            while len(members.workers) < len(CREW):
                await asyncio.sleep(0.01)
            self._ready.set()
            await self._stop.wait()
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.dispatcher.stop()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    @property
    def token(self) -> str:
        return (self.run_dir / "admin.token").read_text().strip()

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        sent = {"authorization": f"Bearer {self.token}", **headers}
        url = f"{self.url}/admin/v1/{path}"
        with httpx.Client(trust_env=False, timeout=10) as client:
            return client.request(method, url, json=body, headers=sent)

    def epd(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, ["admin", "--run-dir", str(self.run_dir), *arguments])

    def data(self, *arguments: str) -> Any:
        result = self.epd(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def roles(self) -> dict[str, tuple[str, str, int]]:
        workers = self.data("status")["workers"]
        return {w["name"]: (w["stages"], w["state"], w["epoch"]) for w in workers}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    for name in [name for name in os.environ if name.startswith("EPD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CI", "1")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("run"))
    yield running
    running.stop()


def refusal(response: httpx.Response, status: int, code: str) -> dict[str, str]:
    assert response.status_code == status, response.text
    error: dict[str, str] = response.json()["error"]
    assert error["code"] == code
    assert set(error) == {"code", "what", "why", "next"} and all(error.values())
    return error


# the token


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_asks_for_the_token(service: Service, method: str, path: str) -> None:
    before = service.roles()
    for header in ("", "Bearer", "Bearer wrong-token-wrong-token", f"Basic {service.token}",
                   f"Bearer {service.token}x"):  # fmt: skip
        answer = service.call(method, path, {"stages": "P"}, authorization=header)
        refusal(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert service.token not in answer.text
    assert service.roles() == before


def test_the_token_file_is_its_owners_alone_and_stays_for_the_next_gateway(tmp_path: Path) -> None:
    path = make_token(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = read_token(path)
    assert len(token) >= 32
    assert read_token(make_token(tmp_path)) == token
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="Cannot trust"):
        make_token(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "short", "x" * 600, "ünprintable-ünprintable", "two\nlines" * 4]
)
def test_tokens_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(ConfigError, match="token cannot be used"):
        read_token(file)
    with pytest.raises(ConfigError, match="Cannot read"):
        read_token(tmp_path / "none")


def test_a_running_gateway_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ConfigError, match="No gateway was found"):
        find()
    here = [Endpoint(f"http://127.0.0.1:{n}", "token", os.getpid()) for n in range(2)]
    for number, endpoint in enumerate(here):
        (tmp_path / f"epd-{number}").mkdir()
        announce(tmp_path / f"epd-{number}", endpoint)
    with pytest.raises(ConfigError, match="2 gateways run here"):
        find()
    assert find(tmp_path / "epd-1") == here[1]
    # one that has ended, and one that another user could have left
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    announce(tmp_path / "epd-0", Endpoint("http://127.0.0.1:1", "token", dead.pid))
    assert find() == here[1]
    (tmp_path / "epd-1" / "admin.json").chmod(0o666)
    with pytest.raises(ConfigError, match="No gateway"):
        find()
    (tmp_path / "epd-0" / "admin.json").write_text("no json")
    with pytest.raises(ConfigError, match="No gateway runs in"):
        find(tmp_path / "epd-0")


def test_the_public_port_knows_no_admin(start_gateway: Callable[..., Any]) -> None:
    gateway = start_gateway()
    for method, path in ROUTES:
        answer = gateway.http.request(method, f"/admin/v1/{path}", json={"stages": "P"})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"


def test_the_admin_port_serves_no_requests(service: Service) -> None:
    for path in ("/v1/chat/completions", "/v1/models", "/", "/openapi.json", "/docs"):
        with httpx.Client(trust_env=False, base_url=service.url) as client:
            sent = {"authorization": f"Bearer {service.token}"}
            assert client.get(path, headers=sent).status_code == 404
    assert service.url.startswith("http://127.0.0.1:")


# bad input


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"stages": "X"}, 400, "impossible_stages"),
        ({"stages": ""}, 400, "impossible_stages"),
        ({"stages": "DD"}, 400, "impossible_stages"),
        ({"stages": "E" * 33}, 400, "invalid_request"),
        ({"stages": 3}, 400, "invalid_request"),
        ({}, 400, "invalid_request"),
        ({"stages": "P", "surprise": 1}, 400, "invalid_request"),
        ({"stages": "P", "drain_seconds": -1.0}, 400, "impossible_stages"),
        ({"stages": "P", "drain_seconds": 1e9}, 400, "impossible_stages"),
        ({"stages": "P", "force": "yes"}, 400, "invalid_request"),
        ({"stages": "P", "epoch": 99}, 409, "stale_epoch"),
        ([], 400, "invalid_request"),
    ],
)
def test_bad_switches_change_nothing(service: Service, body: Any, status: int, code: str) -> None:
    before = (service.roles(), len(service.data("history")))
    refusal(service.call("POST", "workers/d-3/switch", body), status, code)
    assert (service.roles(), len(service.data("history"))) == before


def test_unknown_names_and_last_workers(service: Service) -> None:
    for verb, body in (("switch", {"stages": "P"}), ("drain", {}), ("resume", {})):
        error = refusal(service.call("POST", f"workers/nobody/{verb}", body), 404, "unknown_worker")
        assert "d-0" in error["why"]
    refusal(service.call("POST", "workers/p-0/switch", {"stages": "D"}), 409, "last_worker")
    refusal(service.call("POST", "workers/p-0/drain", {}), 409, "last_worker")
    refusal(service.call("GET", "switches/nothing"), 404, "unknown_switch")
    refusal(service.call("DELETE", "status"), 405, "no_such_route")


def test_bodies_are_bounded_and_json(service: Service) -> None:
    with httpx.Client(trust_env=False, base_url=service.url) as client:
        sent = {"authorization": f"Bearer {service.token}", "content-type": "application/json"}
        path = "/admin/v1/workers/d-3/switch"
        large = client.post(path, content=b" " * (1 << 17), headers=sent)
        refusal(large, 413, "body_too_large")
        chunked = client.post(path, content=iter([b"{}"]), headers=sent)
        refusal(chunked, 413, "body_too_large")
        refusal(client.post(path, content=b"{", headers=sent), 400, "invalid_request")
        nan = client.post(path, content=b'{"stages":"P","drain_seconds":NaN}', headers=sent)
        assert nan.status_code == 400


# the command line


def test_status_shows_every_worker(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = service.epd("status")
    assert shown.exit_code == 0
    for name in CREW:
        assert name in shown.stdout
    assert "serving" in shown.stdout and "queues E/P/D" in shown.stdout
    monkeypatch.setenv("COLUMNS", "80")
    narrow = service.epd("status").stdout
    assert all(name in narrow for name in CREW) and "serving" in narrow and "E/P/D" in narrow
    assert "leases" not in narrow
    data = service.data("status")
    assert data["ready"] is True and data["switches"] == []
    assert {w["name"] for w in data["workers"]} == set(CREW)
    wanted = {"stages", "state", "epoch", "encode_queue", "prefill_waiting", "handoff_queue",
              "running", "blocks_total", "blocks_free", "cache_hits", "cache_queries",
              "heartbeat_age_s", "resident_bytes", "kv_fallbacks"}  # fmt: skip
    assert wanted <= set(data["workers"][0])


def test_watch_goes_on_until_interrupted(service: Service) -> None:
    program = [sys.executable, "-m", "epd_services.cli.app", "admin", "--run-dir"]
    watch = [str(service.run_dir), "status", "--watch", "--json", "--interval", "0.1"]
    # a test run in the background of a shell inherits an ignored SIGINT
    with subprocess.Popen(
        [*program, *watch], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as watching:  # fmt: skip
        assert watching.stdout is not None
        for _ in range(3):
            assert json.loads(watching.stdout.readline())["ready"] is True
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 130


def test_a_switch_from_the_command_line(service: Service) -> None:
    look = service.epd("switch", "d-0", "P", "--dry-run")
    assert look.exit_code == 0 and "running answers move" in look.stdout
    assert "not known yet" in look.stdout
    assert service.roles()["d-0"] == ("D", "serving", 0)
    done = service.epd("switch", "d-0", "P", "--wait")
    assert done.exit_code == 0, done.output
    for phase in ("drain", "unload", "load", "commit"):
        assert phase in done.stdout
    assert "D → P done" in done.stdout and "0.125 s" in done.stdout
    assert service.roles()["d-0"] == ("P", "serving", 1)
    again = service.epd("switch", "d-0", "p", "--wait")
    assert again.exit_code == 0 and "unchanged" in again.stdout
    assert service.roles()["d-0"] == ("P", "serving", 1)
    stale = service.epd("switch", "d-0", "D", "--epoch", "0")
    assert stale.exit_code == 2 and "epoch 1" in stale.stderr
    back = service.data("switch", "d-0", "D", "--wait", "--epoch", "1")
    assert (back["state"], back["epoch"], back["new"]) == ("done", 1, "D")
    assert set(back["phases"]) == {"drain", "unload", "load", "commit", "total"}
    look = service.epd("switch", "d-0", "P", "--dry-run")
    assert "cost: drain 0.125 s" in look.stdout
    told = service.epd("history")
    assert told.exit_code == 0 and "d-0" in told.stdout and "D → P" in told.stdout
    assert [r["new"] for r in service.data("history", "--last", "2")] == ["P", "D"]


def test_a_switch_under_way_is_joined_and_another_target_is_refused(service: Service) -> None:
    service.workers["d-1"].pause = 1.5
    first = service.data("switch", "d-1", "P")
    same = service.data("switch", "d-1", "P")
    assert first["switch_id"] == same["switch_id"] and not first["final"]
    other = service.epd("switch", "d-1", "E")
    assert other.exit_code == 2
    assert [line[:6] for line in other.stderr.splitlines()] == ["error:", "  why:", " next:"]
    assert service.data("switch", "d-1", "P", "--wait")["switch_id"] in (first["switch_id"], "")
    assert service.roles()["d-1"] == ("P", "serving", 1)
    service.workers["d-1"].pause = 0.0
    service.data("switch", "d-1", "D", "--wait")


def test_refused_and_failed_have_exit_codes_of_their_own(service: Service) -> None:
    refused = service.epd("switch", "p-0", "D")
    assert refused.exit_code == 2 and "--force" in refused.stderr
    look = service.epd("switch", "p-0", "D", "--dry-run")
    assert look.exit_code == 2 and "refused: p-0 is the last worker of P" in look.stdout
    forced = service.epd("switch", "p-0", "D", "--dry-run", "--force")
    assert forced.exit_code == 0
    assert service.epd("switch", "nobody", "D").exit_code == 2
    assert service.epd("switch", "d-2", "XY").exit_code == 2
    service.workers["d-2"].fails_in = "load"
    failed = service.epd("switch", "d-2", "P", "--wait")
    service.workers["d-2"].fails_in = None
    assert failed.exit_code == 1 and "load: it broke" in failed.stdout
    assert service.roles()["d-2"] == ("D", "serving", 0)


def test_drain_and_resume_repeat(service: Service) -> None:
    assert service.data("drain", "d-3") == {"worker": "d-3", "changed": True}
    assert service.data("drain", "d-3") == {"worker": "d-3", "changed": False}
    assert service.roles()["d-3"] == ("D", "drained", 0)
    assert "gets new work again" in service.epd("resume", "d-3").stdout
    assert service.epd("resume", "d-3").exit_code == 0
    assert service.roles()["d-3"] == ("D", "serving", 0)
    assert service.epd("drain", "e-0").exit_code == 2
    assert service.epd("drain", "e-0", "--force").exit_code == 0
    assert service.data("status")["ready"] is False
    service.data("resume", "e-0")


def test_cache_stats_and_flush(service: Service) -> None:
    for number in range(3):
        service.cache.put(str(number), CachedTokens("float16", (1, 1), b"ab"))
    assert service.data("cache", "stats")["entries"] == 3
    assert "3 images held" in service.epd("cache", "stats").stdout
    assert service.data("cache", "flush") == {"flushed": 3}
    assert service.epd("cache", "flush").stdout.strip() == "0 images forgotten"


def test_nobody_there_is_exit_code_3(tmp_path: Path) -> None:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["admin", *arguments])

    nowhere = run("--run-dir", str(tmp_path), "status")
    assert nowhere.exit_code == 3 and "No gateway runs in" in nowhere.stderr
    token = make_token(tmp_path)
    url = f"http://127.0.0.1:{free_port()}"
    silent = run("--url", url, "--token-file", str(token), "switch", "d-0", "P")
    assert silent.exit_code == 3 and "does not answer" in silent.stderr
    assert [line[:6] for line in silent.stderr.splitlines()] == ["error:", "  why:", " next:"]
    assert run("--url", url, "status").exit_code == 2, "a URL needs a token"


def test_a_wrong_token_is_refused_in_three_lines(service: Service, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0123456789abcdef0123\n")
    result = CliRunner().invoke(
        app, ["admin", "--url", service.url, "--token-file", str(wrong), "drain", "d-0"]
    )
    assert result.exit_code == 2
    assert "token is missing or wrong" in result.stderr and "--token-file" in result.stderr
    assert service.roles()["d-0"][1] == "serving"


@pytest.mark.parametrize(
    "command", ["status", "switch", "drain", "resume", "history", "cache stats", "cache flush"]
)
def test_help_documents_the_exit_codes(command: str) -> None:
    said = CliRunner().invoke(app, ["admin", *command.split(), "--help"])
    assert said.exit_code == 0
    assert "Exit codes:" in said.stdout and "nothing was changed" in " ".join(said.stdout.split())
