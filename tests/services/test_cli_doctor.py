"""The doctor: a sound machine passes; what is wrong is found and advised on."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from epd_services.cli import doctor
from epd_services.cli.app import app
from epd_services.stack import free_port


@pytest.fixture(autouse=True)
def small_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EPD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("EPD_PORT", str(free_port()))


def states() -> dict[str, str]:
    return {check.name: check.state for check in doctor.run_checks()}


def test_this_machine_passes() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["ok"] is True
    found = {check["name"]: check for check in report["checks"]}
    assert found["model"]["state"] == "ok"
    assert "loads and answers" in found["model"]["found"]
    assert {"versions", "settings", "GPU", "memory", "token cache", "port", "ipc sockets"} <= set(
        found
    )
    assert all(check["advice"] for check in report["checks"] if check["state"] != "ok")


def test_a_missing_model_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EPD_MODEL", str(tmp_path))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "config.json" in result.stdout


def test_wrong_settings_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPD_TOPOLOGY", "1X")
    assert states()["settings"] == "fail"


def test_a_variable_that_is_no_setting_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not doctor.unknown_variables()
    monkeypatch.setenv("EPD_MAX_INFLIGT", "8")
    monkeypatch.setenv("EPD_API_KEY", "a-key-for-epd-ask")
    assert doctor.unknown_variables() == ["EPD_MAX_INFLIGT is no setting; EPD_MAX_INFLIGHT?"]
    assert states()["settings"] == "warn"


def test_a_port_in_use_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("EPD_PORT", str(taken.getsockname()[1]))
        assert states()["port"] == "warn"


def test_no_redis_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_server", lambda: None)
    assert states()["token cache"] == "warn"


def test_an_open_run_directory_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setenv("EPD_RUN_DIR", str(tmp_path))
    assert states()["run directory"] == "warn"
    tmp_path.chmod(0o700)
    assert "run directory" not in states()


def test_too_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPD_KV_MEMORY_BYTES", str(1 << 50))
    settings = doctor.load_settings()[0]
    assert [check.state for check in doctor._memory(settings)] == ["warn"]


def test_a_check_that_breaks_has_failed() -> None:
    def broken(_: object) -> object:
        raise RuntimeError("boom")

    settings = doctor.load_settings()[0]
    (check,) = doctor._guarded("x", broken, settings)
    assert (check.state, check.found) == ("fail", "RuntimeError: boom")
