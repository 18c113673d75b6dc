"""Role switches of real processes: killed in every phase, whoever it is, they lose nothing, double
nothing, change nothing, and end in one clear state.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from epd_services.admin.client import AdminClient, RefusedError, UnreachableError, open_client

PAUSE = 0.7
PHASES = ("drain", "unload", "load", "ready", "commit")
PAUSES = ",".join(f"switch.{phase}=pause:{PAUSE}" for phase in PHASES)


class Operator:
    """A stack with an operator who watches every role that is ever reported."""

    def __init__(self, stack: Any) -> None:
        self.stack = stack
        self.roles: dict[tuple[str, str, int], set[str]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def run_dir(self) -> Path:
        directory: Path = self.stack.supervisor.run_dir
        return directory

    def admin(self) -> AdminClient:
        return open_client(None, None, self.run_dir)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            try:
                with self.admin() as admin:
                    workers = admin.status()["workers"]
            except (UnreachableError, OSError):
                continue
            for w in workers:
                self.roles.setdefault((w["name"], w["life"], w["epoch"]), set()).add(w["stages"])

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)

    def status(self) -> dict[str, dict[str, Any]]:
        with self.admin() as admin:
            return {worker["name"]: worker for worker in admin.status()["workers"]}

    def epd(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        program = [sys.executable, "-m", "epd_services.cli.app", "admin"]
        command = [*program, "--run-dir", str(self.run_dir), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)

    def wait_all(self, limit: float = 40.0) -> None:
        """Until every process is back and serves."""
        until = time.monotonic() + limit
        while time.monotonic() < until:
            try:
                self.stack.wait_ready(limit=limit)
                if all(w["state"] == "serving" for w in self.status().values()):
                    return
            except UnreachableError:
                pass
            time.sleep(0.1)
        raise AssertionError(self.stack.logs())

    def restore(self, topology: dict[str, str]) -> None:
        """Everybody in the role it was started with, also who died a moment ago."""
        time.sleep(1.5)  # longer than a death goes unnoticed
        for _ in range(3):
            self.stack.wait_ready()
            try:
                with self.admin() as admin:
                    for name in topology:
                        admin.resume(name)
                self.wait_all()
                for name, stages in topology.items():
                    self._put(name, stages)
            except RefusedError:
                time.sleep(1.5)  # its death had not been noticed yet
                continue
            return self.wait_all()
        raise AssertionError(self.status())

    def _put(self, name: str, stages: str) -> None:
        with self.admin() as admin:
            if self.status()[name]["stages"] != stages:
                follow(admin, admin.switch(name, stages, drain_seconds=5.0)["switch_id"])


def follow(admin: AdminClient, switch_id: str, limit: float = 30.0) -> dict[str, Any]:
    """The final record of a switch."""
    until = time.monotonic() + limit
    while not (record := admin.get(switch_id))["final"]:
        assert time.monotonic() < until, record
        time.sleep(0.02)
    return record


def phase_of(record: dict[str, Any]) -> str:
    """The phase a switch is held in by the pauses."""
    if record["state"] == "committing":
        return "commit"
    ended = ["drain", "unload", "load"]
    return PHASES[sum(phase in record["phases"] for phase in ended)]


def until_phase(admin: AdminClient, switch_id: str, phase: str) -> None:
    """Return while the switch is held in `phase`."""
    until = time.monotonic() + 20
    while True:
        record = admin.get(switch_id)
        assert not record["final"] and time.monotonic() < until, record
        if phase_of(record) == phase:
            break
        time.sleep(0.01)
    if phase == "drain":
        time.sleep(PAUSE / 4)


TOPOLOGY = {"encode-0": "E", "prefill-0": "P", "decode-0": "D", "decode-1": "D", "decode-2": "D"}


@contextmanager
def operating(start_stack: Callable[..., Any], **flags: Any) -> Iterator[Operator]:
    with start_stack(**flags) as stack:
        operator = Operator(stack)
        try:
            yield operator
        finally:
            operator.close()
    two_roles = {key: seen for key, seen in operator.roles.items() if len(seen) > 1}
    assert two_roles == {}, "a worker had two roles at one epoch"


@pytest.fixture(scope="module")
def shared(questions: Any, start_stack: Callable[..., Any]) -> Iterator[Operator]:
    flags = {"model": questions.model, "topology": "1E1P3D", "failpoints": PAUSES}
    with operating(start_stack, **flags) as operator:
        yield operator


@pytest.fixture
def operator(shared: Operator) -> Operator:
    shared.restore(TOPOLOGY)
    return shared


def during(
    operator: Operator, questions: Any, accident: Callable[[AdminClient], Any], count: int = 12
) -> tuple[list[Any], Any]:
    """What `accident` returned while every decode worker was busy, and the answers of that time.

    Each of `count` clients asks again until all workers were seen at work together; their last
    answers come back.
    """

    async def run() -> tuple[list[Any], Any]:
        busy = asyncio.Event()
        async with asyncio.timeout(120):
            clients = asyncio.gather(
                *(keep_asking(operator.stack, questions, number, busy) for number in range(count))
            )
            while not clients.done() and not busy.is_set():
                workers = await asyncio.to_thread(operator.status)
                if all(w["running"] for w in workers.values() if "D" in w["stages"]):
                    busy.set()

            def go() -> Any:
                with operator.admin() as admin:
                    return accident(admin)

            result = await asyncio.to_thread(go) if busy.is_set() else None
            return await clients, result

    return asyncio.run(run())


async def keep_asking(stack: Any, questions: Any, number: int, until: asyncio.Event) -> Any:
    """The first answer to end after `until`; the ones before are checked."""
    await asyncio.sleep(number * 0.05)  # so that not all end at once
    while True:
        (reply,) = await stack.all([questions.body(stack, number)])
        if until.is_set():
            return reply
        questions.check_one(reply, number)


def all_decode(admin: AdminClient, limit: float = 20.0) -> None:
    """Return once nobody is on the way to a decode worker: who is, would have to try another."""
    until, seen = time.monotonic() + limit, 0
    while seen < 3:  # what a worker says of itself may be a beat old
        others = [w for w in admin.status()["workers"] if "D" not in w["stages"]]
        idle = not any(
            w["running"] or w["kv_leases"] or w["encode_queue"] or w["handoff_queue"]
            for w in others
        )
        seen = seen + 1 if idle else 0
        assert time.monotonic() < until, others
        time.sleep(0.1)


def no_leaks(operator: Operator) -> None:
    """Every block, lease and queue is back where it started."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        workers = operator.status().values()
        if all(not w["running"] and not w["kv_leases"] and not w["encode_queue"]
               and not w["handoff_queue"] and w["blocks_free"] == w["blocks_total"]
               for w in workers):  # fmt: skip
            return
        time.sleep(0.1)
    raise AssertionError(workers)


def begin(worker: str, stages: str) -> Callable[[AdminClient], str]:
    """The accident that `worker` is to change its role."""

    def accident(admin: AdminClient) -> str:
        return str(admin.switch(worker, stages, drain_seconds=5.0)["switch_id"])

    return accident


def serves(operator: Operator, questions: Any) -> None:
    """The stack answers as before."""
    stack = operator.stack
    questions.check(asyncio.run(stack.all(questions.bodies(stack, 4))))


def switch_and_kill(phase: str, worker: str, victim: str, stack: Any) -> Callable[..., str]:
    def accident(admin: AdminClient) -> str:
        record = admin.switch(worker, "P", drain_seconds=5.0)
        until_phase(admin, record["switch_id"], phase)
        stack.kill(victim)
        return str(record["switch_id"])

    return accident


def the_switching_worker_dies(operator: Operator, questions: Any, phase: str) -> None:
    worker = f"decode-{PHASES.index(phase) % 3}"
    killing = switch_and_kill(phase, worker, worker, operator.stack)
    replies, switch_id = during(operator, questions, killing)
    questions.check(replies)
    with operator.admin() as admin:
        record = follow(admin, switch_id)
    assert record["state"] == "lost" and "was lost while" in record["error"]
    operator.wait_all()
    back = operator.status()[worker]
    assert (back["stages"], back["epoch"], back["state"]) == ("D", 0, "serving")
    no_leaks(operator)


def a_peer_dies(operator: Operator, questions: Any, phase: str) -> None:
    worker, peer = ("decode-0", "decode-1") if PHASES.index(phase) % 2 else ("decode-1", "decode-2")
    killing = switch_and_kill(phase, worker, peer, operator.stack)
    replies, switch_id = during(operator, questions, killing)
    questions.check(replies)
    with operator.admin() as admin:
        record = follow(admin, switch_id)
    assert (record["state"], record["error"]) == ("done", None)
    assert operator.status()[worker]["stages"] == "P"
    no_leaks(operator)


def the_admin_client_dies(operator: Operator, questions: Any, phase: str) -> None:
    def accident(admin: AdminClient) -> str:
        command = operator.epd("switch", "decode-2", "P", "--wait", start_new_session=True)
        until = time.monotonic() + 20
        while not (running := admin.status()["switches"]):
            assert time.monotonic() < until
            time.sleep(0.02)
        until_phase(admin, running[0]["switch_id"], phase)
        os.killpg(command.pid, signal.SIGKILL)
        command.communicate()
        return str(running[0]["switch_id"])

    replies, switch_id = during(operator, questions, accident)
    questions.check(replies)
    with operator.admin() as admin:
        record = follow(admin, switch_id)
    assert (record["state"], record["new"]) == ("done", "P")
    again = operator.epd("switch", "decode-2", "P", "--wait")
    assert "unchanged" in again.communicate(timeout=30)[0] and again.returncode == 0
    no_leaks(operator)


def test_long_answers_go_on_at_a_peer_when_the_drain_is_short(
    operator: Operator, questions: Any
) -> None:
    """Moved with their KV: none is computed again, no token comes twice."""
    before = operator.stack.pipeline()["counters"]

    def accident(admin: AdminClient) -> dict[str, Any]:
        all_decode(admin)
        return follow(admin, admin.switch("decode-0", "P", drain_seconds=0.2)["switch_id"])

    for _ in range(4):  # the answers at hand may all be about to end
        replies, record = during(operator, questions, accident)
        questions.check(replies)
        assert (record["state"], record["error"]) == ("done", None)
        if record["moved"]:
            break
        operator.restore(TOPOLOGY)
    assert record["moved"] >= 1 and record["phases"]["drain"] < 0.2 + PAUSE + 2.0
    after = operator.stack.pipeline()["counters"]
    for name in ("retries", "repeated_tokens", "evicted"):
        assert after.get(name, 0) == before.get(name, 0), name
    no_leaks(operator)


@pytest.mark.parametrize("phase", ["drain", pytest.param("commit", marks=pytest.mark.slow)])
def test_killing_the_switching_worker_loses_nothing(
    operator: Operator, questions: Any, phase: str
) -> None:
    the_switching_worker_dies(operator, questions, phase)


def test_killing_a_peer_loses_nothing_and_the_switch_goes_on(
    operator: Operator, questions: Any
) -> None:
    a_peer_dies(operator, questions, "drain")


def test_killing_the_admin_client_leaves_the_switch_alone(
    operator: Operator, questions: Any
) -> None:
    the_admin_client_dies(operator, questions, "unload")


def test_losing_the_last_peer_takes_the_switch_back(operator: Operator, questions: Any) -> None:
    def accident(admin: AdminClient) -> str:
        admin.drain("decode-2", force=False)
        record = admin.switch("decode-0", "P", drain_seconds=5.0)
        with pytest.raises(RefusedError, match="last worker of D"):
            admin.switch("decode-1", "P", drain_seconds=5.0)
        until_phase(admin, record["switch_id"], "drain")
        operator.stack.kill("decode-1")
        return str(record["switch_id"])

    replies, switch_id = during(operator, questions, accident)
    questions.check(replies)
    with operator.admin() as admin:
        record = follow(admin, switch_id)
    assert record["state"] == "failed" and record["error"] == "taken back: decode-1 was lost"
    back = operator.status()["decode-0"]
    assert (back["stages"], back["epoch"]) == ("D", 0)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "dies", [the_switching_worker_dies, a_peer_dies, the_admin_client_dies],
    ids=["worker", "peer", "admin"],
)  # fmt: skip
def test_every_death_in_every_phase(
    operator: Operator, questions: Any, phase: str, dies: Callable[..., None]
) -> None:
    time.sleep(10)  # the supervisor gives up on a process that dies too often
    dies(operator, questions, phase)


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", ["switch.received", "switch.move", *(f"switch.{p}" for p in PHASES)]
)
def test_a_worker_that_ends_itself_at_a_failpoint(
    questions: Any, start_stack: Callable[..., Any], point: str
) -> None:
    flags = {"model": questions.model, "topology": "1E1P2D", "failpoints": f"{point}=exit"}
    with operating(start_stack, **flags) as operator:
        replies, switch_id = during(operator, questions, begin("decode-0", "P"))
        questions.check(replies)
        with operator.admin() as admin:
            assert follow(admin, switch_id)["state"] == "lost"
        operator.wait_all()
        assert operator.status()["decode-0"]["stages"] == "D"
        no_leaks(operator)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["switch.drain", "switch.unload", "switch.load", "switch.ready",
                                   "switch.commit"])  # fmt: skip
def test_a_worker_that_fails_at_a_point_serves_its_old_role(
    questions: Any, start_stack: Callable[..., Any], point: str
) -> None:
    flags = {"model": questions.model, "topology": "1E1P2D", "failpoints": f"{point}=raise"}
    with operating(start_stack, **flags) as operator:
        replies, switch_id = during(operator, questions, begin("decode-0", "E"))
        questions.check(replies)
        with operator.admin() as admin:
            record = follow(admin, switch_id)
        assert record["state"] == "failed" and "failpoint" in record["error"]
        back = operator.status()["decode-0"]
        assert (back["stages"], back["epoch"], back["state"]) == ("D", 0, "serving")
        serves(operator, questions)
        no_leaks(operator)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["admin.accepted", "admin.ready", "admin.committed"])
def test_a_gateway_that_dies_in_a_switch_leaves_every_worker_in_one_role(
    questions: Any, start_stack: Callable[..., Any], point: str
) -> None:
    flags = {"model": questions.model, "topology": "1E1P2D", "failpoints": f"{point}=exit"}
    with operating(start_stack, **flags) as operator:
        with operator.admin() as admin, pytest.raises(UnreachableError):
            follow(admin, admin.switch("decode-0", "P", drain_seconds=5.0)["switch_id"])
        time.sleep(1.0)
        operator.wait_all()
        after = operator.status()["decode-0"]
        assert (after["stages"], after["epoch"]) in (("D", 0), ("P", 1))
        serves(operator, questions)
        no_leaks(operator)
