"""Membership on a fake clock: joining, silence, new lives, other models, stalls of the observer."""

from epd.membership import Change, Membership
from epd.messages import Heartbeat, KVLayout, WorkerStats
from epd.roles import Stage
from epd.wire import Envelope


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def heard(
    members: Membership, name: str = "a", life: int = 1, epoch: int = 0, *,
    stages: str = "D", revision: str = "r", accepting: bool = True, dtype: str = "float32",
    encoder: str = "e", kv: str = "", groups: str = "",
) -> list[tuple[Change, str]]:  # fmt: skip
    beat = Heartbeat(
        address="x", revision=revision, encoder_revision=encoder, dtype=dtype,
        accepting=accepting, stats=WorkerStats(),
        kv=KVLayout(kv.split(), [int(g) for g in groups or "0" * len(kv.split())]) if kv else None,
    )  # fmt: skip
    return members.heard(Envelope(name, life, epoch, stages, "gateway", 1), beat)


def test_a_worker_joins_once_and_is_lost_after_silence() -> None:
    clock = Clock()
    members = Membership("r", clock, dead_after=1.0)
    assert heard(members) == [(Change.JOINED, "a")]
    assert heard(members) == []
    for _ in range(4):
        clock.now += 0.24
        assert members.expire() == []
    clock.now += 0.24
    assert members.expire() == [(Change.LOST, "a")]
    assert members.hosting(Stage.DECODE) == []


def test_a_new_life_is_a_loss_and_a_join() -> None:
    members = Membership("r", Clock())
    heard(members, life=1)
    assert heard(members, life=2) == [(Change.LOST, "a"), (Change.JOINED, "a")]
    assert heard(members, life=2, epoch=2) == [(Change.LOST, "a"), (Change.JOINED, "a")]


def test_the_next_epoch_of_a_life_is_a_switch_and_older_ones_are_dropped() -> None:
    members = Membership("r", Clock())
    heard(members, epoch=3, stages="D")
    assert heard(members, epoch=4, stages="P") == [(Change.SWITCHED, "a")]
    assert heard(members, epoch=3, stages="D") == []
    assert [w.worker_id for w in members.hosting(Stage.PREFILL)] == ["a"]
    assert members.hosting(Stage.DECODE) == []
    assert members.stale_epochs == 1
    assert members.peers()[0].epoch == 4


def test_a_fenced_worker_gets_nothing_until_another_life_or_epoch() -> None:
    for change in ({"epoch": 1}, {"life": 2}):
        members = Membership("r", Clock())
        heard(members)
        members.fence("a")
        heard(members)
        assert members.fenced("a") and members.hosting(Stage.DECODE) == []
        assert members.unsettled(Stage.DECODE) and not members.unsettled(Stage.PREFILL)
        heard(members, **change)
        assert not members.fenced("a")
        assert [w.worker_id for w in members.hosting(Stage.DECODE)] == ["a"]
    members.fence("nobody")
    assert not members.fenced("nobody")


def test_closed_and_leaving_workers_get_nothing_even_when_alone() -> None:
    members = Membership("r", Clock())
    heard(members, stages="PD")
    members.leaving["a"] = frozenset({Stage.DECODE})
    assert members.hosting(Stage.DECODE) == []
    assert [w.worker_id for w in members.hosting(Stage.PREFILL)] == ["a"]
    members.close("a")
    assert members.hosting(Stage.PREFILL) == []


def test_workers_that_share_work_compute_alike() -> None:
    members = Membership("r", Clock())
    heard(members, "p", stages="P")
    heard(members, "e", stages="E", dtype="bfloat16")
    assert heard(members, "d", stages="D", dtype="bfloat16") == []
    assert members.refused == {"d": "computes in bfloat16, but p in float32"}
    assert heard(members, "e2", stages="E") == []
    assert heard(members, "e3", stages="E", dtype="bfloat16", encoder="f") == []
    assert members.refused["e3"] == "encodes otherwise than e"
    assert sorted(members.workers) == ["e", "p"]
    # once the others are gone, the new ones set the tone
    for name in ("p", "e"):
        members.left(name, 1)
    assert heard(members, "d", stages="D", dtype="bfloat16") == [(Change.JOINED, "d")]
    assert heard(members, "p2", stages="P", dtype="float16") == []


def test_workers_that_hold_kv_otherwise_are_refused_and_the_difference_is_named() -> None:
    members = Membership("r", Clock())
    heard(members, "p", stages="P", kv="int4 fp8")
    assert heard(members, "e", stages="E") == [(Change.JOINED, "e")]
    assert heard(members, "d", kv="int4 fp8") == [(Change.JOINED, "d")]
    for name, kv, groups, why in (
        ("d2", "bf16 bf16", "", "holds the KV of layer 0 as bf16, but p as int4"),
        ("d3", "int4 int4", "", "holds the KV of layer 1 as int4, but p as fp8"),
        ("d4", "int4 fp8", "01", "prunes inside the decoder at other layers than p"),
    ):
        assert heard(members, name, kv=kv, groups=groups) == []
        assert members.refused[name] == why
    # who comes to share KV by a switch of roles is held to it from then on
    assert heard(members, "e", epoch=1, stages="D", kv="bf16 bf16") == [(Change.LOST, "e")]
    assert members.refused["e"].startswith("holds the KV of layer 0")


def test_a_worker_of_another_model_is_refused_and_named() -> None:
    members = Membership("r", Clock())
    assert heard(members, revision="other") == []
    assert "a" in members.refused
    heard(members)
    assert members.refused == {}
    assert heard(members, revision="other") == [(Change.LOST, "a")]


def test_a_refused_worker_is_forgotten_when_it_falls_silent_or_leaves() -> None:
    clock = Clock()
    members = Membership("r", clock, dead_after=1.0)
    for name in ("a", "b"):
        heard(members, name, revision="other")
    members.left("b", 1)
    assert list(members.refused) == ["a"]
    for _ in range(3):
        clock.now += 0.24
        heard(members, "a", revision="other")
        members.expire()
    assert list(members.refused) == ["a"]
    for _ in range(6):
        clock.now += 0.24
        members.expire()
    assert members.refused == {}


def test_a_farewell_ends_one_life_only() -> None:
    members = Membership("r", Clock())
    heard(members, life=1)
    assert members.left("a", 1) == [(Change.LOST, "a")]
    assert heard(members, life=1) == []
    assert heard(members, life=2) == [(Change.JOINED, "a")]


def test_a_draining_worker_is_used_only_when_alone() -> None:
    members = Membership("r", Clock())
    heard(members, "a", accepting=False)
    assert [w.worker_id for w in members.hosting(Stage.DECODE)] == ["a"]
    heard(members, "b")
    assert [w.worker_id for w in members.hosting(Stage.DECODE)] == ["b"]


def test_a_stall_of_the_observer_kills_nobody() -> None:
    clock = Clock()
    members = Membership("r", clock, dead_after=1.0)
    heard(members)
    members.expire()
    clock.now += 5.0
    assert members.expire() == []
    clock.now += 0.2
    assert members.expire() == []
