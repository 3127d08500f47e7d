"""Whole runs, tiny ones: what they leave, that they repeat and resume exactly, and that every component takes part."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from omegaconf import OmegaConf

from fl_sim import __version__, build, composing, execution
from fl_sim.build import CALLS
from fl_sim.checkpoint import load_tensors
from fl_sim.composing import choices, conf_folder
from fl_sim.errors import ConfigError, RunError
from fl_sim.metrics import defense_effectiveness, evaluate
from fl_sim.protocols import Update
from fl_sim.rounds import Federation, detection_rates
from fl_sim.tracking import read_metrics
from fl_sim.training import fit


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four rounds with two erasings."""
    return tiny.run(tmp_path_factory.mktemp("finished") / "run", *tiny.ERASING, "rounds=4")


# What a run leaves ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_exactly_the_promised_files(finished: Path) -> None:
    """Other people's scripts read these names; half-written or stray files would be a mess in a sweep of thousands."""
    assert {path.name for path in finished.iterdir()} == {
        "config.yaml",
        "meta.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "model.pt",
        "model_before_erasing.pt",
        "curves.png",
        "partition.png",
        "attention.pt",
        "attention.png",
        "attention_fine_tune.png",
        "summary.json",
        "done",
    }
    assert (finished / "done").read_bytes() == b""


SHARES = ("acc", "asr", "asr_low", "asr_high", "acc_non_target", "ra")


def test_every_round_has_its_line_of_plain_numbers(finished: Path) -> None:
    """The contract of `metrics.jsonl`: names, types, fractions, and the order of events."""
    kinds = [(event["event"], event["round"]) for event in tiny.events(finished)]
    assert kinds == [("round", 1), ("erase", 2), ("round", 2), ("round", 3), ("erase", 4), ("round", 4)]
    for event in tiny.events(finished, "round"):
        assert {*SHARES, "loss", "clients", "malicious", "seconds", "round", "event"} <= event.keys()
        assert [type(event[key]) for key in ("round", "clients", "malicious")] == [int] * 3
        assert all(type(event[key]) is float and 0 <= event[key] <= 1 for key in SHARES)
        assert event["asr_low"] <= event["asr"] <= event["asr_high"]
        assert event["clients"] == 4
        assert 0 <= event["malicious"] <= 3
        assert event["loss"] > 0
        assert event["seconds"] > 0
    assert sum(event["malicious"] for event in tiny.events(finished, "round")) > 0


def test_every_erasing_has_its_line(finished: Path) -> None:
    """What it found, what it left, and the defense effectiveness rating by its formula."""
    for event in tiny.events(finished, "erase"):
        names = ("acc_before", "asr_before", "acc", "asr")
        assert all(type(event[key]) is float and 0 <= event[key] <= 1 for key in names)
        assert event["der"] == defense_effectiveness(*(event[key] for key in names))
        assert (event["eraser"], type(event["accepted"])) == ("fine_tune", bool)
        assert event["seconds"] > 0


def test_a_round_with_an_erasing_reports_the_erased_model(finished: Path) -> None:
    """The round's line is the state at its end; what the erasing found stands in the erasing's line."""
    after = {event["round"]: event for event in tiny.events(finished, "round")}
    for erasing in tiny.events(finished, "erase"):
        assert erasing["accepted"] is True
        assert (erasing["acc"], erasing["asr"]) == (after[erasing["round"]]["acc"], after[erasing["round"]]["asr"])
        assert erasing["acc_before"] != erasing["acc"]


def test_the_summary_repeats_the_metrics(finished: Path) -> None:
    """Nothing in it is measured anew: it follows from `metrics.jsonl` and the configuration."""
    summary = json.loads((finished / "summary.json").read_text())
    rounds, erasings = tiny.events(finished, "round"), tiny.events(finished, "erase")
    assert (summary["acc"], summary["asr"]) == (rounds[-1]["acc"], rounds[-1]["asr"])
    assert summary["acc_max"] == max(event["acc"] for event in rounds)
    assert summary["asr_max"] == max([e["asr"] for e in rounds] + [e["asr_before"] for e in erasings])
    durable = [event.pop("rounds_until_back") for event in summary["erasings"]]
    assert all(rounds is None or 0 <= rounds <= 2 for rounds in durable)
    assert [event | {"event": "erase"} for event in summary["erasings"]] == erasings
    assert summary["erasing_seconds"] == pytest.approx(sum(event["seconds"] for event in erasings))
    assert (summary["rounds"], summary["seed"], summary["name"]) == (4, 0, "run")
    assert summary["malicious_clients"] == 3  # half of six
    assert summary["choices"]["eraser"] == "fine_tune"
    assert summary["seconds"] == pytest.approx(sum(event["seconds"] for event in rounds))


def test_the_configuration_is_kept_whole_and_resolved(finished: Path) -> None:
    """`resume` reads it and never composes again, so it holds plain values for every key."""
    kept: Any = OmegaConf.to_container(OmegaConf.load(finished / "config.yaml"))
    assert kept == tiny.tiny(*tiny.ERASING, "rounds=4")
    assert "${" not in (finished / "config.yaml").read_text()


def test_the_provenance_says_what_it_takes_to_run_this_again(finished: Path) -> None:
    """Versions, commit, device, seeds and the command."""
    meta = json.loads((finished / "meta.json").read_text())
    assert meta["fl_sim"] == __version__
    assert meta["packages"]["torch"] == version("torch")
    assert all(meta["packages"].values())
    assert meta["seeds"] == {"data": 0, "threat": 0, "train": 0}
    assert meta["argv"] == ["fl-sim", "run"]
    assert meta["device"] in ("cpu", "cuda:0")
    assert meta["python"].startswith("3.")
    assert {"commit", "platform", "processor", "started"} <= meta.keys()
    assert meta["may_vary"] == []


def test_a_run_says_what_a_second_one_may_differ_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks and measurements that decide; on a CPU `engine.deterministic=false` changes nothing."""
    words = ["engine=batched", "engine.deterministic=false", "erasing=budget", "eraser=fine_tune"]
    monkeypatch.setattr(execution, "on_its_engine", lambda *_: None)
    monkeypatch.setattr(execution, "_to_end", lambda *_: {})
    folder = tiny.run(tmp_path / "run", *words)
    assert json.loads((folder / "meta.json").read_text())["may_vary"] == ["engine.clients=auto", "erasing=budget"]
    world = SimpleNamespace(device=torch.device("cuda"), parts=SimpleNamespace(erasing=None))
    config = tiny.tiny("engine=batched", "engine.deterministic=false")
    assert execution._may_vary(config, world, central=True) == ["engine.deterministic=false"]


def test_the_curves_are_a_picture_of_a_sane_size(finished: Path) -> None:
    """A real PNG (its signature and header), wide enough to read and small enough to mail."""
    picture = (finished / "curves.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert 800 <= width <= 2000
    assert 400 <= height <= 1200
    assert 5_000 < len(picture) < 500_000


def test_the_saved_models_are_those_that_were_measured(finished: Path) -> None:
    """`model.pt` scores as the last round's line says, `model_before_erasing.pt` as the last erasing's does."""
    world = build.world_of(build.to_text(execution.read_config(finished)))
    last = {event["event"]: event for event in tiny.events(finished)}
    for name, acc, asr in (
        ("model.pt", last["round"]["acc"], last["round"]["asr"]),
        ("model_before_erasing.pt", last["erase"]["acc_before"], last["erase"]["asr_before"]),
    ):
        model = world.new_model()
        model.load_state_dict(torch.load(finished / name, weights_only=True))
        score = evaluate(model, world.test, world.backdoor)
        assert (score.acc, score.asr) == (acc, asr)


def test_a_saved_model_can_be_started_from(finished: Path, tmp_path: Path) -> None:
    """`init` puts exactly these weights before the first round, instead of fresh ones."""
    config = tiny.tiny(f"init={finished / 'model.pt'}")
    state = execution.prepare(config).initial_model().state_dict()
    saved = torch.load(finished / "model.pt", weights_only=True)
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    fresh = execution.prepare(tiny.tiny()).initial_model().state_dict()
    assert not all(torch.equal(fresh[name], saved[name]) for name in saved)


# Repeatability --------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished: Path, tmp_path: Path) -> None:
    """All metrics but the seconds, and the final model, bit for bit."""
    again = tiny.run(tmp_path / "again", *tiny.ERASING, "rounds=4")
    assert tiny.numbers(again) == tiny.numbers(finished)
    assert same_tensors(again / "model.pt", finished / "model.pt")
    other = tiny.run(tmp_path / "other", *tiny.ERASING, "rounds=4", "seed=1")
    assert tiny.numbers(other) != tiny.numbers(finished)
    assert not same_tensors(other / "model.pt", finished / "model.pt")


def same_tensors(left: Path, right: Path) -> bool:
    a, b = (torch.load(path, weights_only=True) for path in (left, right))
    return bool(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a))


MANY = ("clients=12", "clients_per_round=5", "rounds=4", "threat.fraction=0.4")


def test_seeds_can_be_set_apart(tmp_path: Path) -> None:
    """`seeds.threat` alone decides cohorts and attackers; `seeds.train` the training; so comparisons can be paired."""
    base = tiny.run(tmp_path / "base", *MANY)
    trained = tiny.run(tmp_path / "trained", *MANY, "seeds.train=5")
    threatened = tiny.run(tmp_path / "threatened", *MANY, "seeds.threat=5")

    def column(folder: Path, key: str) -> list[Any]:
        return [event[key] for event in tiny.events(folder, "round")]

    assert column(trained, "malicious") == column(base, "malicious")
    assert column(trained, "train_loss") != column(base, "train_loss")
    assert column(threatened, "malicious") != column(base, "malicious")


def test_each_seed_decides_its_own_draws() -> None:
    """The partition follows `seeds.data`, the malicious clients `seeds.threat`, the first weights `seeds.train`."""

    def draws(*overrides: str) -> tuple[object, object, object]:
        world = execution.prepare(tiny.tiny(*MANY, *overrides))
        weights = world.initial_model().head.weight.flatten().tolist()
        return [share.tolist() for share in world.shares], world.malicious, weights

    base = draws()
    for position, key in enumerate(("data", "threat", "train")):
        changed = draws(f"seeds.{key}=5")
        assert [a == b for a, b in zip(changed, base, strict=True)] == [index != position for index in range(3)]


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(tmp_path: Path) -> Callable[..., Path]:
    """Make a run that ends inside a round: at the start of its `step`, or right after it."""

    def make(step: str, at: int, *overrides: str, after: bool = False) -> Path:
        return tiny.interrupted(tmp_path / "interrupted", step, at, *overrides, after=after)

    return make


MOMENTUM = (*tiny.ERASING, "rounds=5", "server_optimizer=momentum", "server_optimizer.lr=0.5")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts."""
    return tiny.run(tmp_path_factory.mktemp("whole") / "run", *MOMENTUM)


@pytest.mark.parametrize(
    ("step", "at", "after"),
    [
        ("_round", 1, False),  # before anything was done
        ("_aggregate", 3, False),  # the clients have trained
        ("_erase", 2, False),
        ("_erase", 4, True),  # erased and logged, but nothing saved
        ("_save", 2, False),  # the round's line is written, its checkpoint not
        ("_save", 3, True),  # right after a checkpoint
        ("_save", 5, True),  # all rounds done, nothing summarised
    ],
)
def test_an_interrupted_run_goes_on_as_if_never_interrupted(
    interrupted: Callable[..., Path], whole: Path, step: str, at: int, after: bool
) -> None:
    """Wherever in a round it ended: same metrics, same model, with a server optimiser that remembers."""
    folder = interrupted(step, at, *MOMENTUM, after=after)
    assert tiny.numbers(folder) != tiny.numbers(whole) or at == 5
    execution.resume(folder)
    assert tiny.numbers(folder) == tiny.numbers(whole)
    assert same_tensors(folder / "model.pt", whole / "model.pt")
    assert same_tensors(folder / "model_before_erasing.pt", whole / "model_before_erasing.pt")
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_run_can_be_interrupted_and_resumed_again_and_again(
    interrupted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checkpoint only every second round, each resumption begins after an even one."""
    overrides = (*tiny.ERASING, "rounds=6", "server_optimizer=adam", "attack.boost=2", "checkpoint.every=2")
    whole = tiny.run(tmp_path / "whole", *overrides)
    folder = interrupted("_save", 2, *overrides, after=True)
    begun: list[int] = []
    original = Federation._round

    def one_further(self: Federation, t: int) -> None:
        begun.append(t)
        if len(begun) in (2, 5):
            raise tiny.Interrupted
        original(self, t)

    monkeypatch.setattr(Federation, "_round", one_further)
    for _ in range(2):
        with pytest.raises(tiny.Interrupted):
            execution.resume(folder)
    execution.resume(folder)
    assert begun == [3, 4, 3, 4, 5, 5, 6]  # 4 and 5 are broken off; 3 is repeated because only 2 was saved
    assert tiny.numbers(folder) == tiny.numbers(whole)


TIRED = '''\
"""A client with a memory: it goes on with a part of what it did last time."""

from dataclasses import dataclass, replace

import torch

from clients.local.sgd import Sgd


@dataclass(frozen=True)
class Remembering(Sgd):
    """Adds half its last update and counts how often it has taken part."""

    def update(self, model, samples, ctx):
        update = super().update(model, samples, ctx)
        last = ctx.private.get("last", torch.zeros_like(update.delta))
        seen = int(ctx.private.get("seen", 0)) + 1
        private = {"last": update.delta.clone(), "seen": seen}
        return replace(update, delta=update.delta + 0.5 * last, private=private, loss=float(seen))


@dataclass(frozen=True)
class Failing(Sgd):
    """Fails for the clients whose id is even; trains the others."""

    def update(self, model, samples, ctx):
        if ctx.client % 2 == 0:
            raise ValueError(f"client {ctx.client} has no power")
        return super().update(model, samples, ctx)


@dataclass(frozen=True)
class AllFailing(Sgd):
    """Fails always."""

    def update(self, model, samples, ctx):
        raise MemoryError
'''


@pytest.fixture
def own_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An importable module with a user's own clients."""
    (tmp_path / "own_clients.py").write_text(TIRED)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    import sys

    sys.modules.pop("own_clients", None)


REMEMBERING = ("client._target_=own_clients.Remembering", "rounds=5", "attack=none")


@pytest.mark.usefixtures("own_clients")
@pytest.mark.parametrize("extra", ["checkpoint.every=1", "checkpoint.every=2"])
def test_what_clients_remember_survives(interrupted: Callable[..., Path], tmp_path: Path, extra: str) -> None:
    """Private state comes back from its own files; rounds that are repeated do not count twice."""
    whole = tiny.run(tmp_path / "whole", *REMEMBERING, extra)
    folder = interrupted("_save", 4, *REMEMBERING, extra)
    execution.resume(folder)
    assert tiny.numbers(folder) == tiny.numbers(whole)
    states = {int(path.name.split("_")[0]): torch.load(path) for path in (folder / "clients").iterdir()}
    assert sum(state["seen"] for state in states.values()) == 20  # 5 rounds of 4 clients
    assert len(states) == len(list((folder / "clients").iterdir())) <= 6  # a file each, no old ones left
    # The control: the memory shows in the numbers, so losing it would have been noticed.
    forgetful = tiny.run(tmp_path / "forgetful", "rounds=5", "attack=none", extra)
    acc = [[event["acc"] for event in tiny.events(each, "round")] for each in (whole, forgetful)]
    assert acc[0] != acc[1]


@pytest.mark.usefixtures("own_clients")
def test_a_clients_file_is_rewritten_only_when_its_state_has_changed(tmp_path: Path) -> None:
    """With a thousand clients a checkpoint must cost only the cohort: a file carries the round of its last change."""
    folder = tiny.run(tmp_path / "run", *REMEMBERING, "clients_per_round=1", "rounds=3")
    names = sorted(path.name for path in (folder / "clients").iterdir())
    last_round = {int(name.split("_")[0]): int(name.split("_")[1].removesuffix(".pt")) for name in names}
    seen = {client: torch.load(folder / "clients" / f"{client}_{t}.pt")["seen"] for client, t in last_round.items()}
    assert sum(seen.values()) == 3
    assert max(last_round.values()) == 3
    assert len(set(last_round.values())) == len(last_round)  # one client a round


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    """It says what the run came to, and touches no file."""
    before = tiny.snapshot(finished)
    times = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert execution.resume(finished) == json.loads(before["summary.json"])
    assert tiny.snapshot(finished) == before
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == times


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_last_line(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "checkpoint cut short": (lambda folder: cut(folder / "checkpoint.pt"), "can't read .*checkpoint.pt"),
    "checkpoint empty": (lambda folder: (folder / "checkpoint.pt").write_bytes(b""), "can't read .*checkpoint.pt"),
    "another file as checkpoint": (
        lambda folder: (folder / "checkpoint.pt").write_bytes((folder / "model_before_erasing.pt").read_bytes()),
        "checkpoint.pt: format None",
    ),
    "a later format": (
        lambda folder: torch.save(torch.load(folder / "checkpoint.pt") | {"format": 99}, folder / "checkpoint.pt"),
        "format 99, this version reads 1",
    ),
    "metrics without a line": (lambda folder: drop_last_line(folder / "metrics.jsonl"), "shorter than its checkpoint"),
    "a folder as record": (
        lambda folder: ((folder / "metrics.jsonl").unlink(), (folder / "metrics.jsonl").mkdir()),
        "metrics.jsonl: it is not a file",
    ),
    "no configuration": (lambda folder: (folder / "config.yaml").unlink(), "not a run folder: it has no config.yaml"),
    "configuration of nothing": (lambda folder: (folder / "config.yaml").write_text("a: 1\n"), "not a run's config"),
    "configuration unreadable": (lambda folder: (folder / "config.yaml").write_text("a: [1\n"), "can't read .*config"),
    "another model": (
        lambda folder: (folder / "config.yaml").write_text(
            (folder / "config.yaml").read_text().replace("width: 4", "width: 5")
        ),
        "its checkpoint is of another model",
    ),
    "another configuration": (
        lambda folder: (folder / "config.yaml").write_text(
            (folder / "config.yaml").read_text().replace("batch_size: 32", "batch_size: 31")
        ),
        "its checkpoint is of another configuration",
    ),
    "a checkpoint of odd values": (
        lambda folder: torch.save(
            torch.load(folder / "checkpoint.pt") | {"states": [1], "vector": "long"}, folder / "checkpoint.pt"
        ),
        "its checkpoint is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused_and_left_as_it_is(interrupted: Callable[..., Path], damage: str) -> None:
    """One line says what is wrong; a run that could still be rescued by hand is not overwritten."""
    folder = interrupted("_save", 3, *tiny.ERASING, after=True)
    spoil, complaint = DAMAGES[damage]
    spoil(folder)
    before = tiny.snapshot(folder)
    with pytest.raises(RunError, match=complaint) as caught:
        execution.resume(folder)
    assert "\n" not in str(caught.value)
    assert tiny.snapshot(folder) == before


@pytest.mark.usefixtures("own_clients")
def test_a_lost_client_file_is_refused(interrupted: Callable[..., Path]) -> None:
    """A client without its memory would silently go another way."""
    folder = interrupted("_save", 3, *REMEMBERING, after=True)
    next((folder / "clients").iterdir()).unlink()
    with pytest.raises(RunError, match="can't read"):
        execution.resume(folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    """And nothing is put into it."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not a run folder"):
        execution.resume(tmp_path)
    with pytest.raises(RunError, match="no such folder"):
        execution.resume(tmp_path / "nope")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_half_written_last_line_does_no_harm(interrupted: Callable[..., Path], tmp_path: Path) -> None:
    """What a crash leaves of a line is neither read nor kept."""
    whole = tiny.run(tmp_path / "whole", "rounds=4")
    folder = interrupted("_save", 2, "rounds=4", after=True)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "round", "rou')
    assert [event["round"] for event in read_metrics(folder)] == [1, 2]
    execution.resume(folder)
    assert tiny.numbers(folder) == tiny.numbers(whole)


# What goes wrong on the way -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eraser", ["fine_tune", "nad", "reinit_head"])
def test_an_erasing_that_diverges_is_refused(tmp_path: Path, eraser: str) -> None:
    """The model is kept as it was, the line says why, and the run goes on as if there had been no eraser."""
    diverging = (f"eraser={eraser}", "eraser.lr=1e6", "eraser.epochs=1", "eraser.min_steps=4", "erasing.rounds=2")
    folder = tiny.run(tmp_path / "run", *diverging)
    [event] = tiny.events(folder, "erase")
    assert event["accepted"] is False
    assert "NaN" in event["reason"] or "clean-set accuracy fell" in event["reason"]
    without = tiny.run(tmp_path / "without")
    assert [e for e in tiny.numbers(folder) if e["event"] == "round"] == tiny.numbers(without)
    assert same_tensors(folder / "model.pt", without / "model.pt")


def test_an_erasing_that_only_ruins_the_accuracy_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the policy's floor: an eraser that zeroes the head of a model that was right is finite, but useless.

    With all logits equal the model answers class 0: a quarter of the balanced clean set, here below half of the
    trained model's accuracy.
    """
    from defenses.erasing.reinit_head import ReinitHead

    def zeroing(self: ReinitHead, model: Any, clean: object, state: object, ctx: object) -> tuple[Any, dict[str, Any]]:
        copy = self_copy(model)
        torch.nn.init.zeros_(copy.head.weight)
        torch.nn.init.zeros_(copy.head.bias)
        return copy, {}

    from copy import deepcopy as self_copy

    monkeypatch.setattr(ReinitHead, "erase", zeroing)
    learnt = ("attack=none", "data.difficulty=0.1", "client.epochs=8", "client.lr=0.1", "rounds=3", "erasing.rounds=3")
    for floor, accepted in (("0.9", False), ("0.0", True)):
        folder = tiny.run(tmp_path / floor, *learnt, "eraser=reinit_head", f"erasing.floor={floor}")
        [event] = tiny.events(folder, "erase")
        assert event["accepted"] is accepted
        assert event["acc_before"] > 0.5 > event["acc"]
        last = tiny.events(folder, "round")[-1]
        assert last["acc"] == (event["acc"] if accepted else event["acc_before"])


def no_number(token: str) -> None:
    """Called by the JSON reader for the tokens NaN and Infinity, which are no JSON."""
    raise AssertionError(token)


def test_clients_that_diverge_are_refused_and_the_model_stays(tmp_path: Path) -> None:
    """Divergence is a result: the run ends, with null where there is no number, and every line is valid JSON."""
    folder = tiny.run(tmp_path / "run", "client.lr=1e30")
    for text in [*(folder / "metrics.jsonl").read_text().splitlines(), (folder / "summary.json").read_text()]:
        json.loads(text, parse_constant=no_number)
    rounds = tiny.events(folder, "round")
    assert [(event["clients"], event["skipped"], event["train_loss"]) for event in rounds] == [(0, True, None)] * 3
    assert all(event["refused"] == sum(event["refused_for"].values()) == 4 for event in rounds)
    assert {reason for event in rounds for reason in event["refused_for"]} <= {"not_finite", "too_long"}
    assert len({event["loss"] for event in rounds}) == 1
    assert math.isfinite(rounds[0]["loss"])
    assert (folder / "done").exists()


BROKEN_SERVER = "server_optimizer.lr=1e300"
"""Sound updates, and a step of infinity times each."""


def test_a_global_model_of_nan_is_survived(tmp_path: Path) -> None:
    """What clients make of it is refused from then on, and no erasing helps."""
    folder = tiny.run(tmp_path / "run", *tiny.ERASING, BROKEN_SERVER)
    for text in [*(folder / "metrics.jsonl").read_text().splitlines(), (folder / "summary.json").read_text()]:
        json.loads(text, parse_constant=no_number)
    rounds = tiny.events(folder, "round")
    assert [event["clients"] for event in rounds] == [4, 0, 0]
    assert [event["loss"] for event in rounds] == [None] * 3
    assert all(0 <= event["acc"] <= 1 for event in rounds)
    [erasing] = tiny.events(folder, "erase")
    assert erasing["accepted"] is False
    assert (folder / "done").exists()


@pytest.mark.parametrize("aggregator", sorted(choices("aggregator", [conf_folder()])))
def test_every_rule_copes_with_what_is_left_of_a_cohort(tmp_path: Path, aggregator: str) -> None:
    """With this seed one, two, three and no answers of four in its rounds: finite numbers, and nothing is aggregated
    where nobody answered."""
    thinned = ("faults=dropout", "faults.probability=0.5", "rounds=5", "seed=5")
    folder = tiny.run(tmp_path / "run", *thinned, f"aggregator={aggregator}", *NEEDS.get(aggregator, ()))
    rounds = tiny.events(folder, "round")
    assert {0, 1, 2, 3} <= {event["clients"] for event in rounds}
    assert all(event["skipped"] == (event["clients"] == 0) for event in rounds)
    assert all(math.isfinite(event["loss"]) for event in rounds)


@pytest.mark.drawn
def test_a_diverged_run_is_resumed_and_drawn(interrupted: Callable[..., Path]) -> None:
    """NaN in the checkpoint and null in the metrics stop neither."""
    folder = interrupted("_save", 2, BROKEN_SERVER, after=True)
    execution.resume(folder)
    assert len(tiny.events(folder, "round")) == 3
    assert (folder / "curves.png").stat().st_size > 5_000


@pytest.mark.usefixtures("own_clients")
def test_a_failing_client_is_logged_and_left_out(tmp_path: Path) -> None:
    """Its round goes on with the others; the line says who and why."""
    folder = tiny.run(tmp_path / "run", "client._target_=own_clients.Failing", "attack=none", "rounds=4")
    failed = Counter(event["round"] for event in tiny.events(folder, "client_failed"))
    assert failed.total() > 0
    for event in tiny.events(folder, "client_failed"):
        assert event["client"] % 2 == 0
        assert event["reason"] == f"ValueError: client {event['client']} has no power"
    for event in tiny.events(folder, "round"):
        assert event["clients"] == 4 - failed[event["round"]]


@pytest.mark.usefixtures("own_clients")
def test_a_round_in_which_every_client_fails_ends_the_run(tmp_path: Path) -> None:
    """There is nothing to go on with; the reason of the first client is told, and the run is not called done."""
    with pytest.raises(RunError, match="round 1: every client failed; the first one with MemoryError"):
        tiny.run(tmp_path / "run", "client._target_=own_clients.AllFailing", "attack=none")
    assert not (tmp_path / "run" / "done").exists()
    assert len(tiny.events(tmp_path / "run", "client_failed")) == 4


# Every component takes part -------------------------------------------------------------------------------------------

NEEDS = {
    "data": ("data.samples=300",),
    "eraser": ("erasing.rounds=2",),
    "erasing": tiny.ERASING[:3],
    "synthetic": ("data.image_size=8",),
    "resnet18": ("clients_per_round=1", "rounds=1"),
    "wrn_16_1": ("clients_per_round=1", "rounds=1"),
    "adam": ("attack.boost=2",),
    "cnn": ("model.width=4",),
    "fltrust": ("data.clean_fraction=0.1",),
    "flare": ("data.clean_fraction=0.1",),
    "deepsight": ("aggregator.samples=50",),
    "indicator": ("aggregator.epochs=1",),
    "robust_kd": ("eraser.features=0.001",),  # with its own weight of 1 so small and untrained a model diverges
    "pathological": ("clients=6",),
    **dict.fromkeys(("preact_resnet18", "vgg11_bn", "wrn_40_2"), ("clients_per_round=1", "rounds=1")),
    "vit_tiny": ("clients_per_round=1", "rounds=1", "model.depth=3", "model.width=24"),
}
"""What makes a group or a choice quick, or possible at all, in a tiny run."""
FEW = {"epochs": 1, "teacher_epochs": 1, "unlearning_epochs": 1, "min_steps": 2, "rounds": 1} | dict.fromkeys(
    ("warm_up", "steps", "inner_min_steps", "unlearning_min_steps", "recovering_min_steps"), 2
)
"""An eraser's keys that decide how long it takes."""
COMPONENTS = [
    (group, name)
    for group in CALLS
    if group != "tracker"
    for name in choices(group, [conf_folder()])
    if group != "data" or name in ("digits", "synthetic")  # the files of the others are not in the repository
]


def words(group: str, name: str) -> list[str]:
    """A tiny run with this choice, without the keys of the choice that it replaces."""
    base = [word for word in tiny.TINY if not word.startswith((f"{group}=", f"{group}."))]
    needs = [*NEEDS.get(group, ()), *NEEDS.get(name, ())]
    if group == "eraser":
        section: Any = OmegaConf.to_container(OmegaConf.load(choices(group, [conf_folder()])[name])) or {}
        needs += [f"eraser.{key}={few}" for key, few in FEW.items() if key in section]
        needs += ["eraser.inversion.steps=5"] if "inversion" in section else []
    return [*base, f"{group}={name}", *(need for need in needs if name != "digits" or need != "data.samples=300")]


@pytest.mark.parametrize(
    ("group", "name"),
    [
        # In the default suite these are called among others: tests/test_composition.py.
        pytest.param(group, name, marks=[pytest.mark.slow] if group in tiny.COMPOSED else [])
        for group, name in COMPONENTS
    ],
)
def test_the_component_that_a_configuration_names_really_runs(
    group: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own method is called, not a relative's, and the run ends with finite numbers."""
    if name == "ray":
        pytest.importorskip("ray", reason="engine=ray needs the extra `ray`")
    given = tiny.calls_of(monkeypatch, group, name)
    build.world_of.cache_clear()  # so that the data is really loaded
    (tmp_path / "run").mkdir()
    execution.start(composing.compose_config(words(group, name)), tmp_path / "run", [])
    assert given != []
    calls = given or []
    rounds = tiny.events(tmp_path / "run", "round")
    assert all(isinstance(event["loss"], float) and math.isfinite(event["train_loss"]) for event in rounds)
    malicious = sum(event["malicious"] for event in rounds)
    if group == "attack":
        assert len(calls) == malicious
        assert all(ctx.threatening is not None for _, _, ctx in calls)
    if group == "client":
        assert len(calls) >= 12 - malicious  # an attack trains by the benign client, too
    if group == "eraser" and calls:
        assert [event["eraser"] for event in tiny.events(tmp_path / "run", "erase")] == [name]


def test_no_attack_means_no_attacker(tmp_path: Path) -> None:
    """The control of every table: malicious is 0 throughout, and a clean model obeys the trigger no more than chance.

    With ten classes and the target class left out, chance is about 0.1 at most; 0.3 leaves room for a small model.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    execution.start(composing.compose_config(["attack=none", "eraser=none", "rounds=12"]), folder, [])
    rounds = tiny.events(folder, "round")
    assert {event["malicious"] for event in rounds} == {0}
    assert rounds[-1]["acc"] > 0.8
    assert rounds[-1]["asr"] < 0.3
    assert json.loads((folder / "summary.json").read_text())["malicious_clients"] == 0


def test_those_who_would_be_malicious_are_honest_without_an_attack(tmp_path: Path) -> None:
    """Without an attack it makes no difference who would be malicious; and poisoning nothing is honest, too."""
    losses = []
    harmless = ("attack=data_poisoning", "attack.mode=per_batch", "attack.poison_rate=0")
    for number, extra in enumerate((("attack=none",), ("attack=none", "threat.fraction=0"), harmless)):
        folder = tiny.run(tmp_path / str(number), *extra)
        losses.append([(event["loss"], event["train_loss"]) for event in tiny.events(folder, "round")])
    assert losses[0] == losses[1] == losses[2]


SCHEDULES = [
    (("threat=always",), {1, 2, 3, 4, 5}),
    (("threat=window", "threat.first=2", "threat.last=3"), {2, 3}),
    (("threat=single_shot", "threat.at=4"), {4}),
    (("threat=every", "threat.rounds=2", "threat.first=2"), {2, 4}),
]


@pytest.mark.parametrize(("threat", "active"), SCHEDULES)
def test_attackers_attack_when_the_schedule_says_so(tmp_path: Path, threat: tuple[str, ...], active: set[int]) -> None:
    """With all six clients taking part, the three malicious ones attack in exactly these rounds."""
    folder = tiny.run(tmp_path / "run", *threat, "clients_per_round=6", "rounds=5")
    attackers = {event["round"]: event["malicious"] for event in tiny.events(folder, "round")}
    assert attackers == {t: 3 if t in active else 0 for t in range(1, 6)}


def test_the_fixed_sampler_has_as_many_attackers_each_round(tmp_path: Path) -> None:
    """Two of four, where a uniform cohort has between one and three."""
    fixed = tiny.run(tmp_path / "fixed", "sampler=fixed_malicious", "sampler.malicious_per_round=2", "rounds=6")
    assert [event["malicious"] for event in tiny.events(fixed, "round")] == [2] * 6
    uniform = tiny.run(tmp_path / "uniform", "rounds=6")
    assert len({event["malicious"] for event in tiny.events(uniform, "round")}) > 1


POLICIES = [
    (("erasing=never",), []),
    (("erasing=every", "erasing.rounds=2"), [2, 4]),
    (("erasing=every", "erasing.rounds=5"), [5]),
    (("erasing=at_end",), [5]),
]


@pytest.mark.parametrize(("policy", "due"), POLICIES)
def test_the_server_erases_when_its_policy_says_so(tmp_path: Path, policy: tuple[str, ...], due: list[int]) -> None:
    """Rounds k, 2k, ...; or the last one; or none, and then there is no saved model from before."""
    folder = tiny.run(tmp_path / "run", *tiny.ERASING[:3], *policy, "rounds=5")
    assert [event["round"] for event in tiny.events(folder, "erase")] == due
    assert (folder / "model_before_erasing.pt").exists() == bool(due)


RULES = ("all_to_one", "all_to_all", "source_specific", "clean_label")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("mode", "trigger"), [("dataset", "blend"), ("per_batch", "badnets")])
def test_every_rule_mode_and_trigger_is_measured(tmp_path: Path, rule: str, mode: str, trigger: str) -> None:
    """Each combination runs and has its ASR; under all_to_all no class is left out of the non-target accuracy."""
    choice = (f"backdoor.rule={rule}", f"attack.mode={mode}", f"trigger={trigger}")
    folder = tiny.run(tmp_path / "run", *choice, "rounds=1")
    for event in tiny.events(folder, "round"):
        assert isinstance(event["asr"], float)
        assert rule != "all_to_all" or event["acc_non_target"] == event["acc"]


def test_rule_mode_and_trigger_reach_the_training(tmp_path: Path) -> None:
    """The control of the test above: each of them alone changes the trained model."""
    losses = {
        extra: tuple(event["train_loss"] for event in tiny.events(tiny.run(tmp_path / extra, extra), "round"))
        for extra in (
            "seed=0",
            *(f"backdoor.rule={rule}" for rule in RULES[1:]),
            "attack.mode=per_batch",
            "trigger=blend",
        )
    }
    assert len(set(losses.values())) == len(losses) == 6


def test_evaluation_keeps_to_its_schedule_and_never_misses_the_end(tmp_path: Path) -> None:
    """`eval.every=2` of five rounds: measured after 2, 4 and the last; the other lines have no score, no old one.

    And measuring changes nothing: the scores are those of a run that measures every round.
    """
    folder = tiny.run(tmp_path / "run", "eval.every=2", "rounds=5")
    rounds = tiny.events(folder, "round")
    assert [event["round"] for event in rounds if "acc" in event] == [2, 4, 5]
    assert all({"acc", "asr", "loss"} & event.keys() == set() for event in rounds if event["round"] in (1, 3))
    assert all({"clients", "malicious", "seconds"} <= event.keys() for event in rounds)
    each = tiny.run(tmp_path / "each", "rounds=5")
    measured = [event for event in tiny.numbers(folder) if "acc" in event]
    assert measured == [
        event for event in tiny.numbers(each) if event["round"] in (2, 4, 5)
    ]  # measuring changes nothing


def test_checkpoints_keep_to_their_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`checkpoint.every=3` of five rounds: after 3 and after the last."""
    saved: list[int] = []
    original = Federation._save
    monkeypatch.setattr(Federation, "_save", lambda self, t: [saved.append(t), original(self, t)][1])
    tiny.run(tmp_path / "run", "checkpoint.every=3", "rounds=5")
    assert saved == [3, 5]


def test_a_rule_that_rejects_is_scored_by_the_truth(tmp_path: Path) -> None:
    """Krum keeps one of four: with m attackers, tpr·m + fpr·(4 − m) = 3 rejected, and rates only where defined."""
    folder = tiny.run(tmp_path / "run", "aggregator=krum", "rounds=6")
    for event in tiny.events(folder, "round"):
        attackers = event["malicious"]
        assert ("tpr" in event) == (attackers > 0)
        rejected = event.get("tpr", 0) * attackers + event["fpr"] * (4 - attackers)
        assert rejected == pytest.approx(3)
    mean = tiny.run(tmp_path / "mean")
    assert all("tpr" not in event and "fpr" not in event for event in tiny.events(mean, "round"))


def test_detection_rates_by_hand() -> None:
    """Two attackers, one of them rejected; three honest clients, one of them rejected."""
    assert detection_rates([True, True, False, False, False], [True, False, True, False, False]) == {
        "tpr": 1 / 2,
        "fpr": 1 / 3,
    }
    assert detection_rates([False], [False]) == {"fpr": 0.0}
    assert detection_rates([True], [True]) == {"tpr": 1.0}


def test_an_attacker_is_told_its_weight_and_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `boost: auto` needs: all attackers of a round hear the same summed weight, and each its own rank.

    All six clients take part with equal weights, three attack: the sum is one half.
    """
    from clients.attacks.model_replacement import ModelReplacement

    told: list[Any] = []
    original = ModelReplacement.update

    def spying(self: ModelReplacement, model: Any, samples: Any, ctx: Any) -> Any:
        told.append(ctx)
        return original(self, model, samples, ctx)

    monkeypatch.setattr(ModelReplacement, "update", spying)
    everyone = ("clients_per_round=6", "sampler.weighting=equal", "rounds=1", "engine.workers=1", "attack.boost=auto")
    tiny.run(tmp_path / "run", *everyone)
    assert [ctx.threatening.weight for ctx in told] == pytest.approx([0.5] * 3)
    assert [(ctx.threatening.rank, ctx.threatening.attackers) for ctx in told] == [(0, 3), (1, 3), (2, 3)]
    assert [ctx.client for ctx in told] == sorted(ctx.client for ctx in told)
    assert {ctx.threatening.server_rate for ctx in told} == {1.0}
    assert {ctx.fit for ctx in told} == {fit}


def test_two_processes_cannot_write_into_one_folder(tmp_path: Path) -> None:
    """The second is refused in one line and changes nothing; when the first has gone, it may."""
    folder = tmp_path / "run"
    folder.mkdir()
    with execution.alone(folder), pytest.raises(RunError, match="in use by another process"), execution.alone(folder):
        pass
    with execution.alone(folder):
        assert list(folder.iterdir()) == []


def test_a_model_of_nans_is_given_no_attack_success(tmp_path: Path) -> None:
    """A server's rate of 1e300 destroys the model; argmax of NaN is class 0, the target, which is no success.

    And such a model is refused as a start.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    execution.start(composing.compose_config([*tiny.TINY, BROKEN_SERVER, "rounds=2"]), folder, [])
    rounds = [event for event in tiny.events(folder) if event["event"] == "round"]
    assert [event["asr"] for event in rounds] == [None, None]
    with pytest.raises(ConfigError, match=r"init=.*NaN"):
        execution.prepare(composing.compose_config([*tiny.TINY, f"init={folder / 'model.pt'}"]))


def test_clients_without_samples_take_no_part(tmp_path: Path) -> None:
    """alpha 0.01 with min_samples 0 leaves clients empty: an update of zeros would be a vote for standing still."""
    folder = tmp_path / "run"
    folder.mkdir()
    skew = ["partition.alpha=0.01", "partition.min_samples=0", "clients=12", "clients_per_round=12", "rounds=1"]
    config = composing.compose_config([*tiny.TINY, *skew])
    present = sum(len(share) > 0 for share in build.world_of(build.to_text(config)).shares)
    assert 0 < present < 12
    execution.start(config, folder, [])
    assert tiny.events(folder, "client_failed") == []
    [event] = tiny.events(folder, "round")
    assert event["clients"] == present


def test_broken_batch_statistics_are_broken_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound parameters and NaN in one client's statistics: it is refused, and the global model stays sound."""
    from clients.local.sgd import Sgd

    original = Sgd.update

    def spoiled(self: Sgd, model: Any, samples: Any, ctx: Any) -> Update:
        update = original(self, model, samples, ctx)
        if ctx.client == 2:
            update.delta[ctx.layout.parameters :] = float("nan")
        return update

    monkeypatch.setattr(Sgd, "update", spoiled)
    folder = tiny.run(tmp_path / "run", "attack=none", "clients_per_round=6")
    for event in tiny.events(folder, "round"):
        assert (event["clients"], event["refused_for"]) == (5, {"not_finite": 1})
        assert math.isfinite(event["loss"])
    assert {event["client"] for event in tiny.events(folder, "client_refused")} == {2}


@pytest.mark.parametrize(("eraser", "remembers"), [(tiny.ERASING, False), ((), True)])
def test_an_erasing_ends_what_the_server_optimiser_remembers(
    tmp_path: Path, eraser: tuple[str, ...], remembers: bool
) -> None:
    """Momentum holds steps of the model that was erased: it would lead straight back."""
    folder = tiny.run(tmp_path / "run", "server_optimizer=momentum", "rounds=2", *eraser)
    assert all(event["accepted"] for event in tiny.events(folder, "erase"))
    assert bool(load_tensors(folder / "checkpoint.pt")["states"]["server_optimizer"]) is remembers


@pytest.mark.parametrize("eraser", ["clp", "rnp", "linf"])
def test_a_model_of_nan_is_not_even_given_to_the_eraser(tmp_path: Path, eraser: str) -> None:
    """Some can't do with it: singular values of NaN are an error."""
    overrides = (BROKEN_SERVER, f"eraser={eraser}", "erasing.rounds=2")
    folder = tiny.run(tmp_path / "run", *overrides)
    [erasing] = tiny.events(folder, "erase")
    assert erasing["accepted"] is False
    assert erasing["reason"] == "the erased model holds NaN or infinity"
    assert (folder / "done").exists()


def test_a_resumed_run_knows_that_attackers_have_attacked(tmp_path: Path) -> None:
    """Else a round in which all of them fail would end it, which the uninterrupted run survives."""
    assert load_tensors(tiny.run(tmp_path / "a") / "checkpoint.pt")["attacked"] is True
    assert load_tensors(tiny.run(tmp_path / "b", "attack=none") / "checkpoint.pt")["attacked"] is False
