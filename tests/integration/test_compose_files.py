"""The container files: they follow the Compose specification, open nothing, leak nothing, and agree
with each other and with the settings.
"""

import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from epd_services.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
OVERRIDES = [(), ("gpu",), ("auth",), ("model",), ("gpu", "auth", "model")]
WORKERS = {"encoder", "prefill", "decode"}
Compose = Callable[..., dict[str, Any]]


def seconds(text: str) -> float:
    value, unit = re.fullmatch(r"([\d.]+)(s|m)", text).groups()  # type: ignore[union-attr]
    return float(value) * {"s": 1, "m": 60}[unit]


@pytest.fixture(params=OVERRIDES, ids=lambda names: "+".join(names) or "alone")
def services(request: pytest.FixtureRequest, compose: Compose) -> dict[str, Any]:
    found: dict[str, Any] = compose(*request.param, EPD_MODEL_DIR="/models")["services"]
    return found


def docker_compose() -> bool:
    found = shutil.which("docker")
    return (
        bool(found)
        and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    )


@pytest.mark.skipif(not docker_compose(), reason="the docker compose plugin is not installed")
@pytest.mark.parametrize("overrides", OVERRIDES)
def test_compose_itself_accepts_the_files(overrides: tuple[str, ...]) -> None:
    files = ["compose.yaml", *(f"compose.{name}.yaml" for name in overrides)]
    flags = [word for file in files for word in ("-f", str(DOCKER / file))]
    command = ["docker", "compose", *flags, "config", "--quiet"]
    environment = os.environ | {"EPD_MODEL_DIR": "/models"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def validate(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*command, *map(str, files)], capture_output=True, text=True)


def test_the_files_follow_the_compose_specification(tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    done = validate(*sorted(DOCKER.glob("compose*.yaml")))
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DOCKER / "compose.yaml").read_text().replace("read_only:", "readonly:"))
    assert validate(wrong).returncode == 1


def test_only_the_gateway_is_reached_from_outside_and_only_on_loopback(
    services: dict[str, Any], compose: Compose
) -> None:
    assert {name for name, s in services.items() if "ports" in s} == {"gateway"}
    assert all(p.startswith("127.0.0.1:") for p in services["gateway"]["ports"])
    assert services["gateway"]["networks"] == ["pipeline", "front"]
    assert all(s["networks"] == ["pipeline"] for n, s in services.items() if n != "gateway")
    assert compose()["networks"]["pipeline"]["internal"] is True
    assert not any("network_mode" in s or "privileged" in s for s in services.values())


def test_no_secret_is_in_an_environment_or_an_argument(services: dict[str, Any]) -> None:
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            assert not re.search("KEY|PASSWORD|SECRET|TOKEN", name) or name.endswith("_FILE")
            assert "@" not in urlsplit(str(value)).netloc
    words = " ".join([*services["redis"]["entrypoint"], *services["redis"]["command"]])
    assert "requirepass $(cat $secret)" in words
    assert "--requirepass" not in words


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_secrets_are_files_and_declared(overrides: tuple[str, ...], compose: Compose) -> None:
    model = compose(*overrides, EPD_MODEL_DIR="/models")
    declared = model["secrets"]
    assert all(set(s) == {"file"} and s["file"].startswith("./secrets/") for s in declared.values())
    assert {name for s in model["services"].values() for name in s["secrets"]} == set(declared)
    for service in model["services"].values():
        text = str(service.get("environment", {})) + str(service.get("command"))
        assert set(re.findall(r"/run/secrets/(\w+)", text)) == set(service["secrets"])


def test_every_container_is_contained(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["init"] is True
        assert service["restart"] == "on-failure"
        assert any(t.startswith("/tmp:") for t in service["tmpfs"])
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
        assert name == "redis" or "user" not in service
        assert all(v.endswith(":ro") for v in service.get("volumes", []))
    assert services["redis"]["user"] == "999:999"


def test_stopping_waits_longer_than_draining(services: dict[str, Any]) -> None:
    for service in services.values():
        drain = float(service.get("environment", {}).get("EPD_DRAIN_SECONDS", 0))
        # the gateway waits for its requests, then for the answers to leave
        assert seconds(service["stop_grace_period"]) > 2 * drain + 1
    assert {float(services[w]["environment"]["EPD_DRAIN_SECONDS"]) for w in WORKERS} == {20.0}


def test_everything_waits_for_the_health_of_what_it_needs(services: dict[str, Any]) -> None:
    needs = {name: s.get("depends_on", {}) for name, s in services.items()}
    assert {name: set(of) for name, of in needs.items()} == {
        "redis": set(), "encoder": {"redis"}, "prefill": {"redis"}, "decode": {"redis"},
        "gateway": {"redis", *WORKERS},
    }  # fmt: skip
    assert all(c == {"condition": "service_healthy"} for of in needs.values() for c in of.values())
    for service in services.values():
        assert seconds(service["healthcheck"]["start_period"]) >= 10
    assert services["gateway"]["healthcheck"]["test"][-1].endswith("/ready")


def test_workers_can_be_scaled(services: dict[str, Any]) -> None:
    for worker in WORKERS:
        assert "container_name" not in services[worker] and "hostname" not in services[worker]
        assert "--name" not in services[worker]["command"]
        assert "EPD_ADVERTISE" not in services[worker]["environment"]
        assert services[worker]["environment"]["EPD_BIND"].startswith("tcp://0.0.0.0:")


def test_every_variable_is_a_setting(services: dict[str, Any]) -> None:
    for service in services.values():
        ours = {n for n in service.get("environment", {}) if n.startswith("EPD_")}
        assert {name.removeprefix("EPD_").lower() for name in ours} <= set(Settings.model_fields)


def test_the_gpu_override_reserves_devices_for_workers_alone(compose: Compose) -> None:
    plain, gpu = compose()["services"], compose("gpu", EPD_DECODE_GPU="1")["services"]
    for name in WORKERS:
        device = gpu[name]["deploy"]["resources"]["reservations"]["devices"][0]
        ids = ["1" if name == "decode" else "0"]
        assert device == {"driver": "nvidia", "device_ids": ids, "capabilities": ["gpu"]}
        assert gpu[name]["environment"]["EPD_DEVICE"] == "cuda"
        assert gpu[name]["build"]["target"] == "gpu"
        cache = gpu[name]["environment"]["TRITON_CACHE_DIR"]
        assert any(t.startswith(f"{cache}:exec") for t in gpu[name]["tmpfs"])
    assert all(gpu[name] == plain[name] for name in ("gateway", "redis"))


def test_keys_close_the_gateway(compose: Compose) -> None:
    environment = compose("auth")["services"]["gateway"]["environment"]
    assert environment["EPD_API_KEY_FILE"] == "/run/secrets/api_keys"
    assert environment["EPD_ALLOW_OPEN_HTTP"] == "0"


def test_images_run_without_root_and_say_how_they_are(
    services: dict[str, Any], images: dict[str, Any]
) -> None:
    for service in (s for name, s in services.items() if name != "redis"):
        image = images[service["build"]["target"]]
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", image.user)
        assert image.environment["PYTHONSAFEPATH"] == "1"
        assert service["healthcheck"]["test"] == image.healthcheck
        assert image.entrypoint == ["epd"]
    # Triton needs a C compiler when it runs; nothing else has one
    built = {name: " ".join(images[name].steps) for name in ("gateway", "cpu", "gpu")}
    assert [name for name, steps in built.items() if "apt-get install" in steps] == ["gpu"]
    assert all("pip uninstall" in steps and "pip install" not in steps for steps in built.values())


def test_image_tags_are_pinned(compose: Compose) -> None:
    source = (DOCKER / "Dockerfile").read_text()
    model = compose()["services"]
    bases = [re.search(r"ARG PYTHON_IMAGE=(\S+)", source)[1], model["redis"]["image"]]  # type: ignore[index]
    assert all(re.search(r":\d[\w.]*-", base) for base in bases)
    assert model["gateway"]["build"]["args"]["PYTHON_IMAGE"] == bases[0]


def requirements(lines: list[str]) -> dict[str, str]:
    pairs = [re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in lines]  # type: ignore[union-attr]
    return dict(pairs)  # type: ignore[arg-type]


def test_the_gateway_image_installs_what_the_gateway_imports(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    text = (DOCKER / "gateway-requirements.txt").read_text()
    listed = requirements([line for line in text.splitlines() if not line.startswith("#")])
    assert listed.items() <= requirements(project).items()
    assert not {"torch", "transformers", "safetensors"} & set(listed)
    code = (
        "import sys, epd_services.gateway.process, epd_services.gateway.image_child, "
        "epd_services.cli.app, redis.asyncio\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not {"torch", "transformers", "numpy"} & loaded
    owners = importlib.metadata.packages_distributions()
    needed = {owners[name][0].lower().replace("_", "-") for name in loaded if name in owners}
    direct = needed & {name.lower() for name in requirements(project)}
    assert direct <= set(listed)
    assert {"fastapi", "pyzmq", "redis", "uvicorn", "tokenizers"} <= direct


def test_the_example_names_the_variables_of_the_files() -> None:
    named = set(re.findall(r"^#?(EPD_\w+)=", (DOCKER / "env.example").read_text(), re.MULTILINE))
    files = "".join(path.read_text() for path in DOCKER.glob("compose*.yaml"))
    assert named == set(re.findall(r"\$\{(EPD_\w+)", files))


def test_the_secrets_that_the_script_makes(tmp_path: Path, compose: Compose) -> None:
    directory = tmp_path / "secrets"
    command = ["sh", str(DOCKER / "make-secrets.sh"), str(directory)]
    subprocess.run(command, check=True, capture_output=True)
    made = {path.name: path.read_text() for path in directory.iterdir()}
    assert set(made) == set(compose("auth")["secrets"])
    assert all(re.fullmatch(r"[0-9a-f]{64}\n", text) for text in made.values())
    assert len(set(made.values())) == 3
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert Settings(wire_key_file=directory / "wire_key").wire_key() is not None
    subprocess.run(command, check=True, capture_output=True)
    assert {path.name: path.read_text() for path in directory.iterdir()} == made
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"docker/secrets/", "docker/.env"} <= set(ignored)
