"""Misbehaving clients: what the server refuses and counts, faults drawn by seed, quorums, and exact resuming."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import misbehaving
import pytest
import tiny
import torch
from flwr.app import Error, Message, RecordDict
from omegaconf import OmegaConf
from toys import seeded

from clients.faults import KINDS, Crashes, Dropout, Garbage, Mixed, Stragglers, spoiled
from fl_sim import build, composing, execution
from fl_sim.acceptance import LONGEST, fault_in, needed
from fl_sim.checkpoint import load_tensors
from fl_sim.engines.flower import SERVER_NODE
from fl_sim.engines.inprocess import FIRST_NODE, InProcessGrid
from fl_sim.engines.replies import header, read_replies
from fl_sim.errors import ConfigError, RunError
from fl_sim.protocols import Fault
from fl_sim.rounds import Federation
from server.app import GridExchange

FIELDS = {"asked", "attempts", "skipped", "refused", "refused_for"}


def rounds(folder: Path) -> list[dict[str, Any]]:
    return tiny.events(folder, "round")


def same_model(left: Path, right: Path) -> bool:
    one, other = (load_tensors(folder / "model.pt") for folder in (left, right))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Clients that misbehave -----------------------------------------------------------------------------------------------

MANY = (
    *("clients=33", "clients_per_round=33", "data.samples=600", "partition=iid", "attack=none", "rounds=3"),
    *("threat.fraction=0", "sampler.weighting=equal"),
)
"""One client for each way to misbehave, and two honest ones."""
EXPECTED = Counter(reason for reason, _ in misbehaving.KINDS.values()) + Counter(raised=len(misbehaving.RAISING))


def on(engine: str, app: str) -> tuple[str, ...]:
    more = {"batched": ("engine.clients=4",), "ray": ("engine.workers=2",)}.get(engine, ())
    return (f"engine={engine}", f"+engine.client_app=misbehaving:{app}", *more)


RAY = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("engine", ["inprocess", "batched", pytest.param("ray", marks=RAY)])
def test_whatever_a_client_does_costs_only_its_own_update(tmp_path: Path, engine: str) -> None:
    """Thirty-one ways at once: each is counted under its reason, the round goes on with the two who are honest, and
    nothing of the others is left: the model is that of a run in which they merely raise."""
    assert len(misbehaving.NAMES) == 31
    folder = tiny.run(tmp_path / "run", *MANY, *on(engine, "app"))
    first, second, third = rounds(folder)
    assert (second["clients"], second["asked"], second["refused"]) == (2, 33, 31)
    assert second["refused_for"] == dict(EXPECTED)
    assert second["skipped"] is False
    assert [event["clients"] for event in (first, third)] == [33, 33]
    assert not FIELDS & (first.keys() | third.keys())
    refused = tiny.events(folder, "client_refused")
    assert {event["client"]: event["kind"] for event in refused} == {
        number: misbehaving.KINDS[name][0] for number, name in enumerate(misbehaving.NAMES) if name in misbehaving.KINDS
    }
    assert all(event["round"] == 2 and event["reason"] for event in refused)
    assert [event["client"] for event in tiny.events(folder, "client_failed")] == [0, 1, 2, 3]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["refused"], summary["skipped"]) == (31, 0)
    control = tiny.run(tmp_path / "control", *MANY, *on(engine, "raising"))
    assert rounds(control)[1]["refused_for"] == {"raised": 31}
    assert [event["loss"] for event in rounds(control)] == [event["loss"] for event in rounds(folder)]
    assert same_model(folder, control)


@pytest.mark.parametrize("marked", [pytest.param("ray", marks=RAY)])
def test_a_client_that_hangs_is_not_waited_for(tmp_path: Path, marked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Ray: when `timeout` is over, the round goes on without it, the next one has all clients, the run ends.

    The first round has all the time it needs, because the workers' start would count.
    """
    from fl_sim.engines.carried import CarryingGrid

    original = CarryingGrid.send_and_receive
    timeouts: list[float | None] = []

    def patient(self: CarryingGrid, messages: Any, *, timeout: float | None = None) -> list[Message]:
        timeouts.append(timeout)
        return original(self, messages, timeout=timeout if len(timeouts) > 1 else None)

    monkeypatch.setattr(CarryingGrid, "send_and_receive", patient)
    words = ("clients=4", "clients_per_round=4", "attack=none", "timeout=60", "engine.workers=2")
    folder = tiny.run(tmp_path / "run", *words, "engine=ray", "+engine.client_app=misbehaving:hanging")
    assert timeouts == [60.0] * 3
    assert [event["clients"] for event in rounds(folder)] == [4, 3, 4]
    assert rounds(folder)[1]["refused_for"] == {"no_reply": 1}
    assert (folder / "done").exists()


def test_where_a_client_cannot_be_left_behind_a_timeout_is_refused() -> None:
    """In one process nobody can end a thread; under Flower's own command the engine is another one."""
    for engine in ("inprocess", "batched"):
        with pytest.raises(ConfigError, match=r"timeout=5.0: must be null with this engine"):
            execution.prepare(tiny.tiny("timeout=5", f"engine={engine}"))
    execution.prepare(tiny.tiny("timeout=5"), foreign=True)
    build.build(tiny.tiny("timeout=5", "engine=ray"))


class Recording(InProcessGrid):
    """Loses the last reply, and remembers how long it was to wait."""

    timeouts: list[float | None]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        self.timeouts = [*getattr(self, "timeouts", []), timeout]
        return super().send_and_receive(messages, timeout=timeout)[:-1]


def test_the_timeout_reaches_the_grid_and_missing_replies_are_counted(tmp_path: Path) -> None:
    """What Flower's Grid leaves out after its timeout has not answered."""
    from clients.app import app

    config = tiny.tiny("timeout=7", "rounds=1")
    world = execution.prepare(config, foreign=True)
    grid = Recording(app, 6, {"config": build.to_text(config), "folder": str(tmp_path)}, 1)
    try:
        Federation(world, GridExchange(grid, world), tmp_path, []).run()
    finally:
        grid.close()
    assert grid.timeouts == [7.0]
    [event] = rounds(tmp_path)
    assert (event["clients"], event["refused_for"]) == (3, {"no_reply": 1})


VECTOR = torch.zeros(5)


def reply_from(node: int, content: RecordDict | Error) -> Message:
    """A reply of that node to a message."""
    grid = InProcessGrid(lambda message, context: Message(content, reply_to=message), 9, {}, 1)  # type: ignore[arg-type]
    try:
        [reply] = grid.send_and_receive([Message(RecordDict(), dst_node_id=node, message_type="train")])
    finally:
        grid.close()
    return reply


def sound(client: int) -> RecordDict:
    from flwr.app import MetricRecord

    from fl_sim.engines.records import TensorArray, by_reference

    return RecordDict(
        {
            "update": by_reference({"delta": TensorArray(torch.ones(5))}),
            "metrics": MetricRecord({"num-examples": 3, "loss": 0.5}),
            "client": header(client, 4, 0),
        }
    )


def test_an_answer_counts_once_and_only_from_those_who_were_asked() -> None:
    """The first is taken, a second one refused, even if the first was of no use; strangers are refused."""
    nodes = {FIRST_NODE + client: client for client in range(4)}
    bad = sound(1)
    del bad["metrics"]
    replies = [
        reply_from(FIRST_NODE, sound(0)),
        reply_from(FIRST_NODE, sound(0)),
        reply_from(FIRST_NODE + 1, bad),
        reply_from(FIRST_NODE + 1, sound(1)),
        reply_from(FIRST_NODE + 3, sound(3)),  # not asked in this round
        reply_from(FIRST_NODE + 7, sound(0)),  # serves nobody
    ]
    updates, refusals = read_replies(replies, [(0, 4, 0), (1, 4, 0), (2, 4, 0)], nodes, VECTOR)
    assert list(updates) == [0]
    assert torch.equal(updates[0].delta, torch.ones(5))
    assert [(each.client, each.reason) for each in refusals] == [
        (0, "duplicate"),
        (1, "malformed"),
        (1, "duplicate"),
        (3, "wrong_client"),
        (None, "wrong_client"),
        (2, "no_reply"),
    ]


@pytest.mark.parametrize(("code", "reason"), [(2, "raised"), (8, "raised"), (3, "no_reply"), (5, "no_reply")])
@pytest.mark.parametrize("node", [FIRST_NODE, SERVER_NODE])
def test_a_node_that_has_gone_is_told_from_a_client_that_raises(code: int, reason: str, node: int) -> None:
    """Flower's SuperLink answers, as node 1, for a node it hears nothing of: that is no answer, and no stranger's."""
    answer = reply_from(node, Error(code, "as Flower says"))
    _, refusals = read_replies([answer], [(0, 4, 0)], {FIRST_NODE: 0}, VECTOR)
    strange = node == SERVER_NODE and reason == "raised"
    assert [each.reason for each in refusals] == (["wrong_client", "no_reply"] if strange else [reason])


@pytest.mark.parametrize(
    ("delta", "reason"),
    [
        (torch.full((5,), LONGEST / 3), None),
        (torch.full((5,), LONGEST), "too_long"),
        (torch.tensor([1.0, 2, float("nan"), 4, 5]), "not_finite"),
        (torch.tensor([1.0, 2, float("inf"), 4, 5]), "not_finite"),
        (torch.zeros(4), "wrong_shape"),
        (torch.zeros(5, dtype=torch.bfloat16), "wrong_dtype"),
    ],
)
def test_what_keeps_an_update_out(delta: torch.Tensor, reason: str | None) -> None:
    """A long update is still one, up to where its square can't be reckoned with."""
    found = fault_in(delta, VECTOR)
    assert (found and found[0]) == reason


def test_what_omniscient_attackers_send_is_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collusion that makes NaN of its rows: the attackers are refused, the others go on."""
    from clients.collusion.alie import Alie

    def broken(self: Alie, deltas: torch.Tensor, malicious: torch.Tensor, ctx: object) -> torch.Tensor:
        return deltas.masked_fill(malicious[:, None], float("nan"))

    monkeypatch.setattr(Alie, "tamper", broken)
    folder = tiny.run(tmp_path / "run", "attack=none", "collusion=alie", "clients_per_round=6")
    for event in rounds(folder):
        assert (event["clients"], event["malicious"], event["refused_for"]) == (3, 0, {"not_finite": 3})
        assert math.isfinite(event["loss"])


# Faults ---------------------------------------------------------------------------------------------------------------


def drawn(faults: Any, count: int = 4000) -> list[Fault]:
    rng = seeded(1)
    return [faults.draw(rng) for _ in range(count)]


def test_faults_come_as_often_as_asked() -> None:
    """Shares of 4000 draws, whose standard error is below 0.008; and at the ends never and always."""
    for make, kind in ((Dropout, "silent"), (Crashes, "crash")):
        kinds = Counter(fault.kind for fault in drawn(make(0.3)))
        assert kinds[kind] / 4000 == pytest.approx(0.3, abs=0.03)
        assert kinds.keys() == {kind, None}
        assert {fault.kind for fault in drawn(make(0.0), 200)} == {None}
        assert {fault.kind for fault in drawn(make(1.0), 200)} == {kind}
    kinds = Counter(fault.kind for fault in drawn(Garbage(0.55)))
    assert all(kinds[kind] / 4000 == pytest.approx(0.05, abs=0.015) for kind in KINDS)
    assert {fault.kind for fault in drawn(Garbage(1.0, ("empty",)), 50)} == {"empty"}
    kinds = Counter(fault.kind for fault in drawn(Mixed(dropout=0.1, crash=0.2, garbage=0.3, kinds=("stale",))))
    for kind, share in (("silent", 0.1), ("crash", 0.2), ("stale", 0.3), (None, 0.4)):
        assert kinds[kind] / 4000 == pytest.approx(share, abs=0.03)


def test_delays_are_log_normal() -> None:
    """P(late) = 1 − Φ(ln(deadline / median) / spread) = 1 − Φ(1) = 0.159 here; half are below the median."""
    seconds = [fault.seconds for fault in drawn(Stragglers(median=3, spread=math.log(2)))]
    assert sum(each > 6 for each in seconds if each is not None) / 4000 == pytest.approx(0.159, abs=0.025)
    assert sum(each > 3 for each in seconds if each is not None) / 4000 == pytest.approx(0.5, abs=0.03)
    assert {fault.seconds for fault in drawn(Stragglers(median=3, spread=0), 10)} == {3.0}


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_spoiling_an_update_leaves_the_clients_own_alone(kind: str | None) -> None:
    """It may remember it; and an update that is not spoiled in its numbers is the very same one."""
    own = torch.arange(5.0)
    sent = spoiled(own, kind)
    assert torch.equal(own, torch.arange(5.0))
    numbers = ("not_a_number", "infinite", "too_long", "wrong_shape", "wrong_dtype")
    assert (sent is own) == (kind not in numbers)
    found = fault_in(sent, VECTOR)
    reason = {"not_a_number": "not_finite", "infinite": "not_finite"}.get(str(kind), kind)
    assert (found and found[0]) == (reason if kind in numbers else None)


REASONS = {"crash": "raised", "silent": "no_reply", "not_a_number": "not_finite", "infinite": "not_finite"}
"""What a kind of fault is refused for, where it is called otherwise."""
FAULTS = {
    "dropout": ("faults.probability=0.4",),
    "crashes": ("faults.probability=0.4",),
    "stragglers": ("faults.spread=1",),
    "garbage": ("faults.probability=0.5",),
    "mixed": ("faults.dropout=0.2", "faults.crash=0.2", "faults.garbage=0.3", "faults.spread=0.8"),
}


def by_hand(config: dict[str, Any], asked: dict[int, list[int]]) -> dict[int, Counter[str]]:
    """What each round must count, from the draws alone."""
    world = build.world_of(build.to_text(config))
    faults = world.parts.faults
    assert faults is not None
    found = {}
    for t, cohort in asked.items():
        found[t] = Counter[str]()
        for client in cohort:
            fault = world.fault_of(client, t, 0)
            if faults.deadline is not None and fault.seconds is not None and fault.seconds > faults.deadline:
                found[t]["late"] += 1
            elif fault.kind is not None:
                found[t][REASONS.get(fault.kind, fault.kind)] += 1
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_counted_as_drawn(tmp_path: Path, name: str) -> None:
    """All six clients are asked in each of five rounds; what is refused is what the draws say, no more and no less."""
    words = (f"faults={name}", *FAULTS[name], "clients_per_round=6", "rounds=5", "attack=none")
    folder = tiny.run(tmp_path / "run", *words)
    expected = by_hand(tiny.tiny(*words), {t: list(range(6)) for t in range(1, 6)})
    total = Counter[str]()
    for event in rounds(folder):
        assert event["refused_for"] == dict(expected[event["round"]])
        extra = event["refused_for"].get("duplicate", 0)  # of such a client the first answer counts
        assert event["clients"] == 6 - event["refused"] + extra
        assert (event["asked"], event["attempts"]) == (6, 1)
        total.update(event["refused_for"])
    assert total.total() > 4
    assert ("simulated_seconds" in rounds(folder)[0]) == (name in ("stragglers", "mixed"))


@pytest.mark.slow
def test_every_aggregator_goes_on_for_ten_rounds_of_faults(tmp_path: Path) -> None:
    """Nearly three thousand orders in all. Each round's refusals are those that were drawn, and no model breaks."""
    total = Counter[str]()
    for name in sorted(composing.choices("aggregator", [composing.conf_folder()])):
        own = {"bulyan": ("threat.fraction=0",), "flower": ("aggregator.strategy=FedAvg",)}.get(name, ())
        words = ("faults=mixed", *FAULTS["mixed"], f"aggregator={name}", *own)
        words += ("data.clean_fraction=0.1", "clients=12", "clients_per_round=12", "rounds=10", "eval.every=10")
        folder = tiny.run(tmp_path / name, *words)
        expected = by_hand(tiny.tiny(*words), {t: list(range(12)) for t in range(1, 11)})
        for event in rounds(folder):
            assert event["refused_for"] == dict(expected[event["round"]]), name
            total.update(event["refused_for"], asked=event["asked"])
        assert len(rounds(folder)) == 10
        assert all(value.isfinite().all() for value in load_tensors(folder / "model.pt").values())
    print(dict(total))
    assert total["asked"] > 2500
    assert total.total() - total["asked"] > 1000


ALL_AT_ONCE = (
    *("faults=mixed", *FAULTS["mixed"], "faults.late=next_round", "clients_per_round=5", "rounds=5"),
    *("quorum=0.5", "below_quorum=repeat", "repeats=2", "client=fed_nad", "client.lr=0.01"),
)
"""Everything that goes wrong, rounds that are tried again, and clients that remember."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        tiny.draw_nothing(patch)
        yield tiny.run(tmp_path_factory.mktemp("whole") / "run", *ALL_AT_ONCE)


def test_the_run_with_everything_has_everything(whole: Path) -> None:
    """The premise of the tests below: repeated rounds, stale updates, and more kinds than a few."""
    reasons = Counter[str]()
    for event in rounds(whole):
        reasons.update(event["refused_for"])
    assert len(reasons) >= 6
    assert reasons["stale"] > 0
    assert any(event["attempts"] > 1 for event in rounds(whole))


@pytest.mark.parametrize(
    "engine",
    [
        ("engine.workers=1",),
        ("engine.workers=3",),
        ("engine=batched", "engine.clients=1"),
        pytest.param(("engine=ray", "engine.workers=2"), marks=RAY),
    ],
)
def test_faults_are_the_same_on_every_engine(tmp_path: Path, whole: Path, engine: tuple[str, ...]) -> None:
    """Same events, same model; each client of the batched engine trains alone, so that its sums are the same too."""
    folder = tiny.run(tmp_path / "run", *ALL_AT_ONCE, *engine)
    assert without_batched(folder) == without_batched(whole)
    assert same_model(folder, whole)


def without_batched(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in event.items() if key != "batched"} for event in tiny.numbers(folder)]


class Interrupted(BaseException):
    """Stands for `kill -9`."""


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_run_with_faults_goes_on_exactly(tmp_path: Path, whole: Path, after: int) -> None:
    """Interrupted in the round after a checkpoint: what was drawn, what is under way and what clients remember."""
    original = Federation._save

    def breaking(self: Federation, t: int) -> None:
        if t == after + 1:
            raise Interrupted
        original(self, t)

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "_save", breaking)
        with pytest.raises(Interrupted):
            tiny.run(folder, *ALL_AT_ONCE)
    execution.resume(folder)
    assert tiny.numbers(folder) == tiny.numbers(whole)
    assert same_model(folder, whole)


def test_late_updates_are_under_way_in_the_checkpoint(tmp_path: Path) -> None:
    """All six are late in round 1 and come in round 2, where they are refused as stale; lost ones never come."""
    slow = ("faults=stragglers", "faults.median=5", "faults.spread=0", "clients_per_round=6", "rounds=2")
    folder = tiny.run(tmp_path / "next", *slow, "faults.late=next_round")
    assert [event["refused_for"] for event in rounds(folder)] == [{"late": 6}, {"late": 6, "stale": 6}]
    assert load_tensors(folder / "checkpoint.pt")["underway"] == [[client, 2, 0] for client in range(6)]
    assert [event["simulated_seconds"] for event in rounds(folder)] == [2.0, 2.0]
    stale = [event["reason"] for event in tiny.events(folder, "client_refused") if event["kind"] == "stale"]
    assert set(stale) == {"the reply is to round 1; asked was for round 2"}
    lost = tiny.run(tmp_path / "lost", *slow)
    assert [event["refused_for"] for event in rounds(lost)] == [{"late": 6}, {"late": 6}]
    patient = tiny.run(tmp_path / "patient", *slow, "faults.deadline=null")
    assert [event["refused"] for event in rounds(patient)] == [0, 0]
    assert [event["simulated_seconds"] for event in rounds(patient)] == [5.0, 5.0]


def test_without_faults_nothing_is_said_and_faults_that_never_come_change_nothing(tmp_path: Path) -> None:
    """The fields appear where there is something to say, or where faults are studied."""
    plain = tiny.run(tmp_path / "plain", *tiny.ERASING)
    assert not any(FIELDS & event.keys() for event in rounds(plain))
    assert "refused" not in json.loads((plain / "summary.json").read_text())
    harmless = tiny.run(tmp_path / "harmless", *tiny.ERASING, "faults=dropout", "faults.probability=0")
    assert all(event["refused"] == 0 and event["refused_for"] == {} for event in rounds(harmless))
    told = [{key: value for key, value in event.items() if key not in FIELDS} for event in tiny.numbers(harmless)]
    assert told == tiny.numbers(plain)
    assert same_model(plain, harmless)


def test_a_run_from_before_there_were_faults_is_still_the_same_run(tmp_path: Path) -> None:
    """Its configuration lacks the keys: it is resumed, and a sweep finds its folder by the same hash."""
    config = tiny.tiny()
    old = {key: value for key, value in config.items() if key not in build.LATER}
    assert len(config) - len(old) == 5
    assert build.config_hash(old) == build.config_hash(config)
    for key, value in (("quorum", 2), ("below_quorum", "repeat"), ("repeats", 4), ("timeout", 1.0)):
        assert build.config_hash(config | {key: value}) != build.config_hash(config)
    assert build.config_hash(tiny.tiny("faults=dropout")) != build.config_hash(config)
    whole = tiny.run(tmp_path / "whole")
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(old)))
    (folder / "meta.json").write_text(json.dumps({"argv": ["fl-sim", "run"]}))
    execution.resume(folder)
    assert tiny.numbers(folder) == tiny.numbers(whole)


# Quorum ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quorum", "asked", "least"), [(1, 9, 1), (7, 9, 7), (0.5, 9, 5), (0.55, 100, 55), (1.0, 9, 9), (0.001, 9, 1)]
)
def test_a_share_is_rounded_up(quorum: float, asked: int, least: int) -> None:
    """So that it is never a smaller share; 0.55 · 100 is 55, whatever floating point makes of it."""
    assert needed(quorum, asked) == least


THIN = ("faults=dropout", "faults.probability=0.5", "clients=8", "clients_per_round=6", "rounds=8", "attack=none")


def test_a_round_below_the_quorum_is_skipped(tmp_path: Path) -> None:
    """The model and the momentum stay as they are, the record says so; every other round has its quorum."""
    folder = tiny.run(tmp_path / "run", *THIN, "quorum=4", "server_optimizer=momentum", "aggregator=fldetector")
    events = rounds(folder)
    skipped = [event for event in events if event["skipped"]]
    assert 0 < len(skipped) < len(events)
    for before, event in pairwise(events):
        if event["skipped"]:
            assert (event["clients"], event["malicious"], event["train_loss"]) == (0, 0, None)
            assert event["refused"] > 2
            assert event["loss"] == before["loss"]
        else:
            assert event["clients"] >= 4
            assert event["loss"] != before["loss"]
    assert all(event["asked"] == 6 and event["attempts"] == 1 for event in events)
    assert json.loads((folder / "summary.json").read_text())["skipped"] == len(skipped)
    assert len(events) == 8


def test_a_round_below_the_quorum_is_repeated_with_another_cohort(tmp_path: Path) -> None:
    """Until it has one, or often enough; each attempt draws its cohort and its faults anew."""
    cohorts: list[tuple[int, int, list[int]]] = []
    original = GridExchange.train

    def spying(self: GridExchange, t: int, vector: Any, orders: Any, briefing: Any) -> Any:
        cohorts.append((t, orders[0].attempt, [order.client for order in orders]))
        return original(self, t, vector, orders, briefing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExchange, "train", spying)
        folder = tiny.run(tmp_path / "run", *THIN, "quorum=0.7", "below_quorum=repeat", "repeats=2")
    for event in rounds(folder):
        mine = [cohort for t, _, cohort in cohorts if t == event["round"]]
        assert len(mine) == event["attempts"]
        assert event["asked"] == 6 * event["attempts"]
        assert event["clients"] >= 5 if not event["skipped"] else (event["clients"], event["attempts"]) == (0, 3)
    numbers = Counter(event["attempts"] for event in rounds(folder))
    assert len(numbers) > 1
    assert any(event["skipped"] for event in rounds(folder))
    assert any(event["attempts"] > 1 and not event["skipped"] for event in rounds(folder))
    again = [pair for t in range(1, 9) if len(pair := [c for r, _, c in cohorts if r == t]) > 1]
    assert any(first != second for first, second, *_ in again)


def test_if_every_client_crashes_the_run_goes_on_and_if_every_client_is_at_fault_it_ends(tmp_path: Path) -> None:
    """A simulated misfortune is what is studied; an error of all clients is a mistake in a setting or a program."""
    folder = tiny.run(tmp_path / "run", "faults=crashes", "faults.probability=1", "rounds=2")
    assert [event["refused_for"] for event in rounds(folder)] == [{"raised": 4}] * 2
    assert all(event["skipped"] for event in rounds(folder))
    few = ("clients=2", "clients_per_round=2", "rounds=3", "attack=none")
    with pytest.raises(RunError, match="round 2: every client failed; the first one with ValueError: no"):
        tiny.run(tmp_path / "fault", *few, *on("inprocess", "raising"))


def test_a_server_erases_in_a_round_that_it_skips(tmp_path: Path) -> None:
    """The calendar, and what watches the run, are the server's own."""
    silent = ("faults=dropout", "faults.probability=1", "rounds=2")
    folder = tiny.run(tmp_path / "run", *tiny.ERASING, *silent)
    assert [event["round"] for event in tiny.events(folder, "erase")] == [2]
    words = ("erasing=on_suspicion", "erasing.patience=1", *tiny.ERASING[:3], "data.clean_fraction=0.1")
    watched = tiny.run(tmp_path / "watched", *words, *silent)
    assert [event["step"] for event in rounds(watched)] == [0.0, 0.0]
    assert all("clean_acc" in event for event in rounds(watched))
