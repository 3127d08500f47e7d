"""The batched engine: the same apps, the same messages, the same results, and clients that really train together."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import meeting_stress
import pytest
import tiny
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from toys import seeded, small_model, spotted

from fl_sim import execution
from fl_sim.composing import compose_config
from fl_sim.engines import batched
from fl_sim.engines.batched import Batched, BatchedGrid
from fl_sim.errors import FolderError, RunError
from fl_sim.rounds import Federation
from fl_sim.samples import Samples
from fl_sim.together.choice import Choices
from fl_sim.together.meeting import Interrupted, Meeting, client_fit
from fl_sim.together.training import Job
from fl_sim.training import Fitted, fit, sgd

BATCHED = ("engine=batched", "engine.clients=3")

# Whole runs -----------------------------------------------------------------------------------------------------------


def assert_near(left: Path, right: Path, tolerance: float) -> None:
    """The same events with near numbers; an accuracy may differ by one of the hundred test images."""
    ours, theirs = tiny.numbers(left), tiny.numbers(right)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() - {"batched"} == other.keys() - {"batched"}
        for name in {"loss", "train_loss"} & mine.keys():
            assert mine.get(name) == pytest.approx(other.get(name), rel=tolerance)
        assert mine.get("acc") == pytest.approx(other.get("acc"), abs=0.0101)
        assert [mine.get(name) for name in ("round", "malicious", "clients")] == [
            other.get(name) for name in ("round", "malicious", "clients")
        ]


@pytest.mark.parametrize(
    "overrides",
    [
        ("attack=model_replacement",),
        ("attack=none", "client.augment=true", "client.momentum=0.9", "client.schedule=cosine"),
        pytest.param(("attack=neurotoxin", "partition.alpha=0.3", "client.epochs=2"), marks=pytest.mark.slow),
        ("attack=data_poisoning", "attack.mode=per_batch", "client.weight_decay=0.001"),
    ],
    ids=["stacked attackers", "augmented", "hooked attackers", "stamped per batch"],
)
def test_a_run_is_the_default_engines_up_to_rounding(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """The same cohorts, batches, poisoned samples and augmentation: after three rounds and an erasing the losses agree
    to 1e-4, float32's rounding grown through thirty steps of training."""
    words = (*tiny.ERASING, *overrides)
    assert_near(tiny.run(tmp_path / "batched", *words, *BATCHED), tiny.run(tmp_path / "plain", *words), 1e-4)


def test_the_record_says_how_many_trained_together(tmp_path: Path) -> None:
    """All four; or, where attackers have hooks, the honest ones, unless one of them is left over."""
    whole = tiny.run(tmp_path / "whole", *BATCHED, "attack=none")
    assert [event["batched"] for event in tiny.events(whole, "round")] == [4, 4, 4]
    hooked = tiny.run(tmp_path / "hooked", *BATCHED, "attack=neurotoxin")
    honest = [event["clients"] - event["malicious"] for event in tiny.events(hooked, "round")]
    assert set(honest) == {1, 2}
    assert [event["batched"] for event in tiny.events(hooked, "round")] == [n if n > 1 else 0 for n in honest]
    alone = tiny.run(tmp_path / "alone", "engine=batched", "engine.clients=1", "attack=none")
    assert [event["batched"] for event in tiny.events(alone, "round")] == [0, 0, 0]


def test_a_stack_of_one_is_the_default_engine_bit_for_bit(tmp_path: Path) -> None:
    """And so is a network that can't be stacked, however many were asked for."""
    words = [word for word in tiny.TINY if word != "model.width=4"]
    words += ["model=vit_tiny", "model.width=12", "model.depth=3", "rounds=1"]

    def numbers(name: str, *overrides: str) -> list[dict[str, Any]]:
        folder = tmp_path / name
        folder.mkdir()
        execution.start(compose_config([*words, *overrides]), folder, ["fl-sim", "run"])
        return [{key: value for key, value in event.items() if key != "batched"} for event in tiny.numbers(folder)]

    assert numbers("vit", *BATCHED) == numbers("plain")
    meta = json.loads((tmp_path / "vit" / "meta.json").read_text())
    [entry] = meta["batched"].values()
    assert entry["clients"] == 1
    assert "VisionTransformer" in entry["reason"]
    one = tiny.run(tmp_path / "one", "engine=batched", "engine.clients=1")
    plain = tiny.run(tmp_path / "default")
    assert [{**event, "batched": 0} for event in tiny.numbers(plain)] == tiny.numbers(one)


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    """Bit for bit at a given number of clients at once, attackers that train alone included."""
    words = (*tiny.ERASING, *BATCHED, "attack=neurotoxin", "clients_per_round=6")
    one, three = (tiny.run(tmp_path / n, *words, f"engine.workers={n}") for n in ("1", "3"))
    assert tiny.numbers(one) == tiny.numbers(three)
    left, right = (torch.load(folder / "model.pt", weights_only=True) for folder in (one, three))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("client", ["sgd", "fed_nad"])
def test_an_interrupted_run_goes_on_exactly(tmp_path: Path, client: str) -> None:
    """With private state (Fed-NAD's teachers, trained together by Adam), and choices that come from `meta.json`."""
    words = ["engine=batched", "rounds=4", "attack=none"]
    words += (
        ["client=fed_nad", "client.epochs=1", "client.optimizer=sgd"] if client == "fed_nad" else ["client.epochs=2"]
    )
    (tmp_path / "cut").mkdir()
    save = Federation._save

    def ending(self: Federation, t: int) -> None:
        save(self, t)
        if t == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "_save", ending)
        patch.setattr(Choices, "_fastest", lambda self, jobs, most: (2, {1: 0.2, 2: 0.1}))
        with pytest.raises(KeyboardInterrupt):
            execution.start(tiny.tiny(*words), tmp_path / "cut", [])
    # Measured anew, it could come out otherwise; what was chosen before the interruption holds.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Choices, "_fastest", lambda self, jobs, most: (2, {1: 0.2, 2: 0.1}))
        whole = tiny.run(tmp_path / "whole", *words)
        patch.setattr(Choices, "_fastest", lambda self, jobs, most: pytest.fail("measured anew"))
        execution.resume(tmp_path / "cut")
    assert tiny.numbers(tmp_path / "cut") == tiny.numbers(whole)
    assert all(event["batched"] == 4 for event in tiny.events(whole, "round"))


def test_auto_says_what_it_chose_and_why(tmp_path: Path) -> None:
    """In `meta.json`, beside what was there, whichever way the clock decides."""
    run = tiny.run(tmp_path / "run", "engine=batched", "rounds=1", "attack=none")
    meta = json.loads((run / "meta.json").read_text())
    assert meta["argv"] == ["fl-sim", "run"]
    [entry] = meta["batched"].values()
    assert (entry["model"], entry["batch_size"], entry["optimizer"]) == ("Sequential", 32, "SGD")
    assert entry["clients"] in {1, 2, 4}
    assert {"1", "4"} <= entry["seconds"].keys()
    assert tiny.events(run, "round")[0]["batched"] == (4 if entry["clients"] > 1 else 0)


# Failures -------------------------------------------------------------------------------------------------------------


def ask(grid: BatchedGrid, *numbers: int) -> list[Message]:
    """A message with a number for each of the first clients."""
    nodes = list(grid.get_node_ids())
    contents = [RecordDict({"ask": ConfigRecord({"number": number})}) for number in numbers]
    return [Message(each, dst_node_id=node, message_type="train") for each, node in zip(contents, nodes, strict=False)]


@pytest.fixture
def grid() -> Iterator[BatchedGrid]:
    """Clients that train a small model on samples of their own; the message's number says what goes wrong."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(message.content.config_records["ask"]["number"])  # type: ignore[arg-type]
        if number == -1:
            raise ValueError("before training")
        samples = spotted(12)
        if number == -2:
            samples = Samples(samples.images, samples.labels + 4)  # labels that the model does not know
        model = small_model()
        rng = seeded(context.node_id)
        fitted = client_fit()(model, samples, sgd(model, 0.1), epochs=abs(number) + 1, batch_size=5, rng=rng)
        if number == -3:
            raise ValueError("after training")
        total = float(sum(parameter.detach().double().sum() for parameter in model.parameters()))
        content = MetricRecord({"loss": fitted.loss, "steps": fitted.steps, "total": total})
        return Message(RecordDict({"answer": content}), reply_to=message)

    made = BatchedGrid(app, 6, {}, 2, Choices(4, 2, {}, lambda choices: None))
    yield made
    made.close()


def answers(replies: Sequence[Message]) -> list[dict[str, Any] | None]:
    return [None if reply.has_error() else dict(reply.content.metric_records["answer"]) for reply in replies]


@pytest.mark.parametrize("fault", [-1, -2, -3], ids=["before", "in", "after"])
def test_a_client_that_fails_fails_alone(grid: BatchedGrid, fault: int) -> None:
    """Before it trains, in the stack, or afterwards; with its own reason, and the others get what they get without it.

    A fault within the stack leaves all its members to train alone, from the draws that they had before.
    """
    numbers = [0, 1, fault, 2]
    found = answers(grid.send_and_receive(ask(grid, *numbers)))
    batched_now = grid.facts()["batched"]
    replies = grid.send_and_receive(ask(grid, *numbers))
    reason = (replies[2].error.reason or "").splitlines()[0]
    assert reason.startswith({-1: "ValueError: before", -2: "IndexError: Target", -3: "ValueError: after"}[fault])
    assert batched_now == {-1: 3, -2: 0, -3: 4}[fault]
    expected = answers(grid.send_and_receive(ask(grid, 0, 1, 3, 2)))
    assert found[2] is None
    for at in (0, 1, 3):
        mine, other = found[at], expected[at]
        assert mine is not None
        assert other is not None
        assert mine["steps"] == other["steps"]
        assert mine["total"] == pytest.approx(other["total"], rel=1e-5)


def test_a_stack_without_room_is_halved(grid: BatchedGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it fits, or each client trains alone; the draws are those of a training that fitted at once."""
    expected = answers(grid.send_and_receive(ask(grid, 0, 0, 0, 0)))
    original = batched.train_together
    tried: list[int] = []

    def cramped(jobs: Sequence[Job]) -> list[Fitted]:
        tried.append(len(jobs))
        for job in jobs:
            torch.rand(1, generator=job.rng)  # what a training that broke off has drawn
        if len(jobs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(batched, "train_together", cramped)
    found = answers(grid.send_and_receive(ask(grid, 0, 0, 0, 0)))
    monkeypatch.setattr(batched, "train_together", original)
    assert tried == [4, 2, 2]
    assert grid.facts()["batched"] == 0
    for mine, other in zip(found, expected, strict=True):
        assert mine is not None
        assert other is not None
        assert mine["total"] == pytest.approx(other["total"], rel=1e-5)


def test_larger_cohorts_come_in_waves(grid: BatchedGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reply in its message's place, all clients counted."""
    whole = answers(grid.send_and_receive(ask(grid, 0, 1, 2, 0, 1, 2)))
    assert grid.facts()["batched"] == 6
    monkeypatch.setattr(batched, "AT_ONCE", 3)
    parts = answers(grid.send_and_receive(ask(grid, 0, 1, 2, 0, 1, 2)))
    assert grid.facts()["batched"] == 6
    assert [each and each["steps"] for each in parts] == [each and each["steps"] for each in whole]
    assert [each and each["total"] for each in parts] == pytest.approx(
        [each and each["total"] for each in whole], rel=1e-5
    )


KEYS = ("model", "batch_size", "optimizer", "clients", "reason")


# The meeting ----------------------------------------------------------------------------------------------------------


def meet(
    visits: Sequence[Sequence[int]],
    slots: int = 1,
    fails: type[BaseException] | None = None,
    at: str = "plan",
    alone: Sequence[int] = (),
) -> list[list[int]]:
    """Clients that train a given number of epochs, one `fit` after the other; which places met at each planning.

    With `fails` they are told that it is over, and their threads end.
    """
    met: list[list[int]] = []
    at_work: list[int] = []
    said: list[str] = []

    def plan(jobs: Sequence[Job]) -> list[list[int]]:
        met.append([job.place for job in jobs])
        if fails is not None and at == "plan":
            raise fails("it failed")
        return [[*range(len(jobs))]] if len(jobs) > 1 else []

    def train(jobs: Sequence[Job]) -> list[Fitted]:
        assert at_work == []
        if fails is not None:
            raise fails("it failed")
        return [Fitted(job.steps, 0.0) for job in jobs]

    def client(place: int) -> int:
        for epochs in visits[place]:
            at_work.append(place)
            assert len(at_work) <= slots
            model = small_model()
            data, optimizer, rng = spotted(8), sgd(model, 0.1), seeded()
            at_work.remove(place)
            try:
                client_fit()(model, data, optimizer, epochs=epochs, batch_size=8, rng=rng)
            except Interrupted as error:
                said.append(str(error))
                raise
        return place

    with ThreadPoolExecutor(max(len(visits), 1)) as pool, ThreadPoolExecutor(slots) as trainers:
        stays = {place: partial(client, place) for place in range(len(visits))}
        try:
            assert Meeting(stays, slots, pool, trainers, lambda job: job.place in alone).lead(plan, train) == list(
                range(len(visits))
            )
        finally:
            pool.shutdown()
            if fails is not None:
                assert said == ["the run was interrupted"] * sum(map(bool, visits))
    return met


@pytest.mark.parametrize("slots", [1, 2])
def test_who_meets_whom_depends_on_no_clock(slots: int) -> None:
    """The n-th meeting is that of everyone's n-th training; who is done is not waited for, one slot or more."""
    visits = [[1], [1, 1, 1], [], [1, 1]]
    for _ in range(3):
        assert meet(visits, slots) == [[0, 1, 3], [1, 3], [1]]
    assert meet([[], []], slots) == []
    assert meet(visits, slots, alone=[1]) == [[0, 3], [3]]  # nobody waits for whom, nor does it wait for anybody


@pytest.mark.parametrize("at", ["plan", "train"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_lets_everyone_go(error: type[BaseException], at: str) -> None:
    """A client that waited for ever would keep the process from ending; whoever leads is told what went wrong."""
    with pytest.raises(error, match="it failed"):
        meet([[1], [1], [1, 1]], fails=error, at=at)


@pytest.mark.slow
def test_four_thousand_meetings_are_interrupted_and_leave_nobody_waiting() -> None:
    """By a signal each, at a random moment; a fast version is above."""
    command = [sys.executable, meeting_stress.__file__, "4000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ends = json.loads(done.stdout)
    assert ends["interrupted"] > 1000
    assert ends["whole"] > 1000
    assert "left waiting" not in ends


def test_an_error_of_a_visit_reaches_whoever_leads() -> None:
    """After the others have come to their end."""
    ended: list[int] = []

    def visit(place: int) -> None:
        if place == 1:
            raise SystemExit(3)
        ended.append(place)

    with ThreadPoolExecutor(3) as pool, ThreadPoolExecutor(1) as trainers, pytest.raises(SystemExit):
        Meeting({place: partial(visit, place) for place in range(3)}, 1, pool, trainers, bool).lead(list, list)
    assert sorted(ended) == [0, 2]


def test_elsewhere_a_client_trains_as_ever() -> None:
    """Outside a meeting there is nobody to wait for: under the other engines, or where a client is called directly."""
    assert client_fit() is fit


@pytest.mark.parametrize("entry", [{"x": 5}, [], 3, {"x": {"clients": 2}}, {"x": dict.fromkeys(KEYS, "4")}])
def test_damaged_choices_are_said(entry: Any, tmp_path: Path) -> None:
    """A resumed run takes them from `meta.json`."""
    (tmp_path / "meta.json").write_text(json.dumps({"batched": entry}))
    with pytest.raises(FolderError, match="its entry 'batched' is damaged"):
        Batched().grid(ClientApp(), 2, {"folder": str(tmp_path)}, 1)


def test_no_thread_for_a_client_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a user may have so many only; whoever has a thread already is let go."""
    begun: list[int] = []

    def start(self: threading.Thread, original: Any = threading.Thread.start) -> None:
        begun.append(1)
        if len(begun) > 3:
            raise RuntimeError("can't start new thread")
        original(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RunError, match=r"no thread for another client of the round \(can't start new thread\)"):
        meet([[1]] * 6)
