"""compose.yaml without containers: its commands, environments, secrets, health checks and order, as
processes of this machine.

What a container gives is translated: a host name and a port become 127.0.0.1 and a free port,
/run/secrets and /tmp become directories of the test, the image's entrypoint and variables are read
from the Dockerfile.
"""

import asyncio
import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw

SECRETS = Path(__file__).parents[2] / "docker" / "make-secrets.sh"
PORTS = ("5600", "6379", "8000")
SCALE = {"encoder": 2}
Compose = Callable[..., dict[str, Any]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Container:
    """One replica of a service, as a process in a session of its own."""

    name: str
    service: dict[str, Any]
    image: Any
    root: Path
    translate: Callable[[str], str]
    process: subprocess.Popen[bytes] | None = None
    healthy: bool = False

    def environment(self) -> dict[str, str]:
        ours = self.image.environment | self.service.get("environment", {})
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        kept = {k: os.environ[k] for k in ("PYTHONPATH", "LD_LIBRARY_PATH") if k in os.environ}
        return {k: self.translate(v) for k, v in ours.items()} | {"PATH": path} | kept

    def run(self, words: list[str], **options: Any) -> subprocess.Popen[bytes]:
        programs = {
            "python": [sys.executable],
            "epd": [sys.executable, "-m", "epd_services.cli.app"],
        }
        command = [*programs.get(words[0], words[:1]), *map(self.translate, words[1:])]
        (self.root / "tmp").mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(command, cwd=self.root / "tmp", env=self.environment(), **options)

    def start(self) -> None:
        words = (self.service.get("entrypoint") or self.image.entrypoint) + self.service["command"]
        if "worker" in words:
            # a container's host name makes the name of a worker unique; here there is one host
            words = [*words, "--name", self.name]
        with self.log.open("wb") as log:
            self.process = self.run(words, stdout=log, stderr=log, start_new_session=True)

    @property
    def log(self) -> Path:
        self.root.mkdir(parents=True, exist_ok=True)
        return self.root / "log"

    def check(self) -> bool:
        """Run the health check once."""
        assert self.process is not None
        assert self.process.poll() is None, f"{self.name} ended: {self.log.read_text()[-2000:]}"
        kind, *words = self.service["healthcheck"]["test"]
        words = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.healthy = self.run(words, **quiet).wait(30) == 0
        return self.healthy

    def processes(self) -> list[int]:
        """Every process of the session that was started for it."""
        assert self.process is not None
        mine = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = entry.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                mine.append(int(entry.parent.name))
        return mine


class Project:
    """What `docker compose up` and `down` do, in the order they do it."""

    def __init__(self, model: dict[str, Any], images: dict[str, Any], root: Path) -> None:
        self.services = model["services"]
        self.root = root
        published = self.services["gateway"]["ports"][0].rpartition(":")[0].rpartition(":")[2]
        self.url = f"http://127.0.0.1:{published}"
        self._ports = {("gateway", "8000"): published}
        self.containers = {
            service: [self._container(service, n, images) for n in range(SCALE.get(service, 1))]
            for service in self.services
        }

    def _container(self, service: str, number: int, images: dict[str, Any]) -> Container:
        spec = self.services[service]
        name = f"{service}-{number + 1}"
        target = spec.get("build", {}).get("target", "")
        image = images.get(target) or type(images["gateway"])()
        root = self.root / name
        return Container(name, spec, image, root, lambda text: self._translate(text, name, root))

    def _port(self, host: str, port: str) -> str:
        return self._ports.setdefault((host, port), str(free_port()))

    def _translate(self, text: str, name: str, root: Path) -> str:
        def place(match: re.Match[str]) -> str:
            host, port = match["host"], match["port"]
            if match["path"]:
                return str(self.root / "secrets" if match["path"] != "/tmp" else root / "tmp")
            if port is None:
                return "127.0.0.1"
            mine = name if name.rpartition("-")[0] not in ("gateway", "redis") else name[:-2]
            return f"127.0.0.1:{self._port(host, port)}" if host else self._port(mine, port)

        hosts, ports = "|".join(self.services), "|".join(PORTS)
        pattern = (
            rf"(?P<path>/run/secrets|(?<![\w./])/tmp\b)|\b0\.0\.0\.0\b"
            rf"|\b(?:(?P<host>{hosts}):)?(?P<port>{ports})\b"
        )
        return re.sub(pattern, place, text)

    def all(self) -> list[Container]:
        return [container for group in self.containers.values() for container in group]

    def up(self, limit: float = 90.0) -> list[str]:
        """Start each service when what it depends on is healthy; the order they got healthy in."""
        until = time.monotonic() + limit
        order: list[str] = []
        while len(order) < len(self.services):
            assert time.monotonic() < until, {c.name: c.log.read_text()[-800:] for c in self.all()}
            for name in [n for n in self.services if n not in order]:
                self._advance(name, order)
            time.sleep(0.8)
        return order

    def _advance(self, name: str, order: list[str]) -> None:
        group = self.containers[name]
        if group[0].process is None:
            if set(self.services[name].get("depends_on", {})) <= set(order):
                for container in group:
                    container.start()
        elif all(container.healthy or container.check() for container in group):
            order.append(name)

    def down(self) -> dict[str, int | None]:
        """Stop what nothing depends on any more, with SIGTERM and the grace period; exit codes."""
        left = [name for name in self.containers if self.containers[name][0].process is not None]
        codes: dict[str, int | None] = {}
        while left:
            needed = {d for name in left for d in self.services[name].get("depends_on", {})}
            free = [name for name in left if name not in needed]
            stopping = [container for name in free for container in self.containers[name]]
            for container in stopping:
                os.kill(container.process.pid, signal.SIGTERM)
            codes |= {container.name: _end(container) for container in stopping}
            left = [name for name in left if name in needed]
        return codes


def _end(container: Container) -> int | None:
    try:
        return container.process.wait(float(container.service["stop_grace_period"][:-1]))
    except subprocess.TimeoutExpired:
        os.killpg(container.process.pid, signal.SIGKILL)
        return None


def circle(color: tuple[int, int, int]) -> dict[str, Any]:
    picture = Image.new("RGB", (224, 224), (225, 225, 220))
    ImageDraw.Draw(picture).ellipse((70, 60, 154, 144), fill=color)
    out = io.BytesIO()
    picture.save(out, "PNG")
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def body(color: tuple[int, int, int], **fields: Any) -> dict[str, Any]:
    content = [circle(color), {"type": "text", "text": "What color is the circle?"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 32, **fields}


@pytest.fixture(scope="module")
def project(
    compose: Compose, images: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    root = tmp_path_factory.mktemp("compose")
    subprocess.run(["sh", str(SECRETS), str(root / "secrets")], check=True, capture_output=True)
    model = compose(EPD_HTTP_PORT=str(free_port()))
    if shutil.which("redis-server") is None:
        del model["services"]["redis"]
        for service in model["services"].values():
            del service["depends_on"]["redis"]
    made = Project(model, images, root)
    try:
        yield made
    finally:
        for container in made.all():
            if container.process is not None and container.process.poll() is None:
                os.killpg(container.process.pid, signal.SIGKILL)


def test_the_stack_starts_answers_and_stops(project: Project) -> None:
    order = project.up()
    assert order[-1] == "gateway"
    assert order[0] in ("redis", "encoder", "prefill", "decode")
    model = httpx.get(f"{project.url}/v1/models").json()["data"][0]["id"]
    workers = httpx.get(f"{project.url}/v1/pipeline").json()["workers"]
    names = {"encoder-1": "E", "encoder-2": "E", "prefill-1": "P", "decode-1": "D"}
    assert {worker["name"]: worker["stages"] for worker in workers} == names
    answers = asyncio.run(ask_together(project.url, model))
    assert [colour in text for colour, text in answers] == [True] * len(answers), answers
    if "redis" in project.services:
        assert no_password(project).startswith(b"-NOAUTH")
        wait_for_a_hit(project.url)
    no_secret_is_visible(project)
    operators_reach_it_from_inside_only(project)
    everybody = {container.name: container.processes() for container in project.all()}
    text, reason, codes = asyncio.run(stop_in_the_middle(project, model))
    assert (reason, len(text) > 0) == ("length", True)
    assert codes == {container.name: 0 for container in project.all()}
    assert next(iter(codes)) == "gateway-1"
    assert len(everybody["gateway-1"]) > 1, "the image decoders belong to the gateway"
    assert [c.name for c in project.all() if c.processes()] == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{project.url}/live")


async def ask_together(url: str, model: str) -> list[tuple[str, str]]:
    """Colours and answers of pictures sent at once, each of them twice."""
    colours = {"red": (220, 40, 40), "blue": (40, 80, 220)}
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        replies = []
        for _ in range(2):
            asked = [body(rgb, model=model, temperature=0) for rgb in colours.values()]
            sent = [client.post("/v1/chat/completions", json=each) for each in asked]
            replies += await asyncio.gather(*sent)
    assert [reply.status_code for reply in replies] == [200] * len(replies), replies[0].text
    texts = [reply.json()["choices"][0]["message"]["content"].lower() for reply in replies]
    return list(zip([*colours, *colours], texts, strict=True))


def no_password(project: Project) -> bytes:
    """What Redis says to somebody who has none."""
    port = int(project.containers["redis"][0].translate("6379"))
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(100)


def wait_for_a_hit(url: str) -> None:
    """Until a picture seen before came out of Redis."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        workers = httpx.get(f"{url}/v1/pipeline").json()["workers"]
        if sum(worker["cache_hits"] for worker in workers) > 0:
            return
        time.sleep(0.1)
    raise AssertionError(workers)


def no_secret_is_visible(project: Project) -> None:
    secrets = [path.read_bytes().strip() for path in (project.root / "secrets").iterdir()]
    shown = [container.log.read_bytes() for container in project.all()]
    for process in (pid for container in project.all() for pid in container.processes()):
        shown += [Path(f"/proc/{process}/{name}").read_bytes() for name in ("cmdline", "environ")]
    assert len(shown) > 15
    assert not any(secret in text for secret in secrets for text in shown)


def operators_reach_it_from_inside_only(project: Project) -> None:
    """`docker compose exec gateway epd admin …`; the published port knows no admin."""
    gateway = project.containers["gateway"][0]
    told = gateway.run(["epd", "admin", "status", "--json"], stdout=subprocess.PIPE)
    workers = json.loads(told.communicate(timeout=30)[0])["workers"]
    assert {w["name"] for w in workers} == {"encoder-1", "encoder-2", "prefill-1", "decode-1"}
    refused = gateway.run(["epd", "admin", "drain", "decode-1"], stderr=subprocess.PIPE)
    assert b"last worker of D" in refused.communicate(timeout=30)[1]
    assert refused.returncode == 2
    assert httpx.get(f"{project.url}/admin/v1/status").status_code == 404
    found = json.loads((gateway.root / "tmp" / "epd" / "admin.json").read_text())
    assert found["url"].startswith("http://127.0.0.1:")
    assert os.stat(found["token_file"]).st_mode & 0o777 == 0o600


async def stop_in_the_middle(
    project: Project, model: str
) -> tuple[str, str | None, dict[str, int | None]]:
    """Stop the stack while a stream is being sent; its text, how it ended, and the exit codes."""
    asked = body((40, 160, 60), model=model, max_tokens=200, ignore_eos=True, stream=True)
    text, reason, stopping = "", None, None
    async with (
        httpx.AsyncClient(timeout=60, trust_env=False) as client,
        client.stream("POST", f"{project.url}/v1/chat/completions", json=asked) as response,
    ):
        async for line in response.aiter_lines():
            if stopping is None and text:
                stopping = asyncio.create_task(asyncio.to_thread(project.down))
            for choice in choices(line):
                text += choice["delta"].get("content") or ""
                reason = choice.get("finish_reason") or reason
    assert stopping is not None
    return text, reason, await stopping


def choices(line: str) -> list[dict[str, Any]]:
    if not line.startswith("data: {"):
        return []
    found: list[dict[str, Any]] = httpx.Response(200, text=line[6:]).json().get("choices", [])
    return found


def test_a_missing_secret_is_named(
    compose: Compose, images: dict[str, Any], tmp_path: Path
) -> None:
    """A service without one of its secrets ends at once and says which file it misses."""
    services = compose("auth")["services"]
    cases = [(name, s) for name in ("gateway", "redis") for s in services[name]["secrets"]]
    cases.append(("encoder", "wire_key"))

    def start_without(case: tuple[str, str]) -> tuple[int | None, str, Path]:
        service, secret = case
        root = tmp_path / f"{service}-{secret}"
        subprocess.run(["sh", str(SECRETS), str(root / "secrets")], check=True, capture_output=True)
        (root / "secrets" / secret).unlink()
        model = compose("auth", EPD_HTTP_PORT=str(free_port()))
        container = Project(model, images, root).containers[service][0]
        container.start()
        return _end(container), container.log.read_text(), root / "secrets" / secret

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(start_without, cases))
    for (service, _), (code, said, path) in zip(cases, results, strict=True):
        assert str(path) in said
        expected = (1, 1) if service == "redis" else (2, 3)
        assert (code, len(said.splitlines())) == expected, said
