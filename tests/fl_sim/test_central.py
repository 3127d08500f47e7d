"""Centralized baselines: the same victim for all erasers, one result each, and nothing lost by an interruption."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fl_sim import central, execution
from fl_sim.build import config_hash, to_text
from fl_sim.central import equal_budget, pooled, victim_hash, watched
from fl_sim.central_table import cell, interval
from fl_sim.cli import FAILED, OK, main
from fl_sim.composing import compose_config, conf_folder
from fl_sim.schema import Central
from fl_sim.world import World

QUICK = (*tiny.TINY, "central.epochs=2", "central.batch_size=32")
ERASERS = "erasers=[fine_tune,reinit_head]"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Erasers of a few steps, whatever their yaml says."""
    original = compose_config

    def composed(overrides: Any) -> Any:
        config = original(overrides)
        for key in ("erasers", "baselines"):
            for section in config[key].values():
                section |= {"epochs": 1, "min_steps": 4}
        return config

    monkeypatch.setattr("fl_sim.composing.compose_config", composed)


def only(folder: Path) -> Path:
    [done] = folder.rglob("done")
    return done.parent


@pytest.mark.usefixtures("quick")
def test_a_central_run_leaves_its_epochs_its_table_and_its_summary(
    cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs of the victim, then one result for each eraser, all from the same victim."""
    assert main(["central", *QUICK, ERASERS]) == OK
    folder = only(cwd / "runs")
    epochs = [(e["method"], e["epoch"]) for e in tiny.events(folder, "central")]
    assert epochs[:2] == [("victim", 1), ("victim", 2)]
    assert {method for method, _ in epochs} == {"victim", "fine_tune", "reinit_head"}
    erased = tiny.events(folder, "erase")
    assert [event["eraser"] for event in erased] == ["fine_tune", "reinit_head"]
    last = tiny.events(folder, "central")[1]
    assert all((e["acc_before"], e["asr_before"]) == (last["acc"], last["asr"]) for e in erased)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["acc"], summary["asr"]) == (last["acc"], last["asr"])
    assert [row["eraser"] for row in summary["erasers"]] == ["fine_tune", "reinit_head"]
    table = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [row["method"] for row in table] == ["victim", "fine_tune", "reinit_head"]
    assert float(table[1]["acc"]) == erased[0]["acc"]
    assert "reinit_head" in (folder / "table.md").read_text()
    assert "reinit_head" in capsys.readouterr().out


def test_all_means_every_eraser_there_is() -> None:
    """But `none`. `baselines=all` is the same."""
    every = {path.stem for path in (conf_folder() / "eraser").glob("*.yaml")} - {"none"}
    assert set(compose_config(["experiment=all_erasers"])["erasers"]) == every
    assert set(tiny.tiny("baselines=all")["baselines"]) == every
    assert "none" in compose_config(["erasers=[none]"])["erasers"]


def test_erasers_are_tried_in_the_order_asked_for() -> None:
    """The table is read from the top; the run's name does not depend on it, as no number does."""
    asked, other = (compose_config([f"erasers=[{names}]"]) for names in ("rnp,anp,nad", "anp,nad,rnp"))
    assert list(json.loads(to_text(asked))["erasers"]) == ["rnp", "anp", "nad"]
    assert config_hash(asked) == config_hash(other)


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[World]:
    """The worlds that one of `central`'s functions is called with from now on."""
    seen: list[World] = []
    original = getattr(central, name)

    def counting(world: World, *rest: Any) -> Any:
        seen.append(world)
        return original(world, *rest)

    monkeypatch.setattr(central, name, counting)
    return seen


@pytest.mark.usefixtures("quick")
def test_ten_erasers_share_one_victim(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The victim is found again by another run with another eraser; another poison rate trains another one."""
    trained = counted(monkeypatch, "train_victim")
    assert main(["central", *QUICK, "erasers=[fine_tune]"]) == OK
    assert main(["central", *QUICK, "erasers=[reinit_head]", "rounds=7", "clients=5"]) == OK
    assert len(trained) == 1
    first, second = (tiny.numbers(done.parent) for done in sorted((cwd / "runs").rglob("done")))
    assert first[:2] == second[:2]
    assert main(["central", *QUICK, ERASERS, "central.poison_rate=0.3"]) == OK
    assert len(trained) == 2


@pytest.mark.usefixtures("quick")
def test_triggers_share_the_clean_model_that_they_are_made_with(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is trained for two triggers and two poison rates, and the victims are those that each would have alone."""
    trained = counted(monkeypatch, "train_clean")
    for number, trigger in enumerate(["trojan", "cl"]):
        given = [*QUICK, f"trigger={trigger}", f"central.poison_rate={0.2 + 0.1 * number}", "erasers=[fine_tune]"]
        assert main(["central", *given, "output=shared"]) == OK
        assert len(trained) == 1
        assert main(["central", *given, f"output=alone{number}"]) == OK
        together, alone = (
            max((cwd / kind).rglob("done"), key=lambda done: done.stat().st_mtime_ns).parent
            for kind in ("shared", f"alone{number}")
        )
        assert tiny.numbers(together) == tiny.numbers(alone)
        trained.pop()
    assert main(["central", *QUICK, "trigger=trojan", "central.epochs=4", "erasers=[fine_tune]", "output=shared"]) == OK
    assert len(trained) == 2


@pytest.mark.parametrize("key", ["seed=1", "trigger.size=3", "model.width=5", "central.epochs=3", "data.samples=301"])
def test_what_decides_a_victim_is_in_its_name(key: str) -> None:
    """And what does not, the eraser or the number of rounds, is not."""
    assert victim_hash(tiny.tiny(key)) != victim_hash(tiny.tiny())
    assert victim_hash(tiny.tiny("eraser=nad", "rounds=9", "name=x")) == victim_hash(tiny.tiny())


@pytest.mark.parametrize("key", ["central.track.every=2", "central.track.every=null", "central.track.images=7"])
def test_how_closely_a_victim_is_watched_is_not_in_its_name(key: str) -> None:
    """Nor was it in the names that victims had before they could be watched less closely."""
    assert victim_hash(tiny.tiny(key)) == victim_hash(tiny.tiny())
    older = tiny.tiny()
    del older["central"]["track"]
    assert victim_hash(older) == victim_hash(tiny.tiny())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("track", "victim", "eraser"),
    [
        ((), [1, 2, 3], [1, 2, 3, 4]),
        (("every=2",), [2, 3], [2, 4]),
        (("every=null",), [3], []),
        (("images=30", "every=3"), [3], [3]),
    ],
)
def test_watching_less_changes_no_weights(
    track: tuple[str, ...], victim: list[int], eraser: list[int], cwd: Path
) -> None:
    """Three epochs of the victim and four of the eraser: which are scored, on how many images, and what never changes.

    Every ACC on 30 images is a multiple of 1/30.
    """
    words = ["central", *QUICK, "central.epochs=3", "erasers=[fine_tune]"]
    assert main([*words, "output=all"]) == OK
    assert main([*words, "output=some", *(f"central.track.{word}" for word in track)]) == OK
    all_, some = only(cwd / "all"), only(cwd / "some")
    states = [torch.load(folder / "model_before_erasing.pt", weights_only=True) for folder in (all_, some)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    before, after = ([e for e in tiny.numbers(folder) if e["event"] == "erase"] for folder in (all_, some))
    assert before == after != []
    scored = tiny.events(some, "central")
    assert [e["epoch"] for e in scored if e["method"] == "victim"] == victim
    assert [e["epoch"] for e in scored if e["method"] == "fine_tune"] == eraser
    if "images=30" in track:
        assert all(e["images"] == 30 and (30 * e["acc"]) == pytest.approx(round(30 * e["acc"])) for e in scored)
    else:
        exact = {(e["method"], e["epoch"]): e["acc"] for e in tiny.events(all_, "central")}
        assert all(e["acc"] == exact[e["method"], e["epoch"]] and "images" not in e for e in scored)


def test_clean_label_attacks_can_have_a_rate_of_their_own() -> None:
    """It replaces the other for them alone; a victim's name knows the one that counts."""
    plan = Central(poison_rate=0.1, clean_label_rate=0.8)
    assert plan.against("clean_label") == Central(poison_rate=0.8)
    assert plan.against("all_to_one") == Central(poison_rate=0.1)
    assert Central(poison_rate=0.1).against("clean_label") == Central(poison_rate=0.1)
    assert victim_hash(tiny.tiny("central.clean_label_rate=0.8")) != victim_hash(tiny.tiny())
    older = tiny.tiny()
    del older["central"]["clean_label_rate"]
    assert victim_hash(older) == victim_hash(tiny.tiny())


@pytest.mark.usefixtures("quick")
def test_a_clean_label_victim_is_named_by_the_rate_that_counts(cwd: Path) -> None:
    """Asked for in either way it is the same victim, found again; and another attack's keeps the other rate."""
    words = ["central", *QUICK, "eraser=none"]
    assert main([*words, "trigger=sig", "central.clean_label_rate=0.5"]) == OK
    assert main([*words, "trigger=sig", "central.poison_rate=0.5"]) == OK
    assert len(list((cwd / "runs/victims").glob("*.pt"))) == 1
    assert main([*words, "central.clean_label_rate=0.5"]) == OK
    assert main(words) == OK
    assert len(list((cwd / "runs/victims").glob("*.pt"))) == 2


def test_the_watched_images_are_few_fixed_and_drawn_by_the_data_seed() -> None:
    """More than there are means all of them; another training seed means the same ones."""
    worlds = [execution.prepare(tiny.tiny(*words)) for words in ((), ("seeds.train=5",), ("seeds.data=5",))]
    picked = [watched(world, 30) for world in worlds]
    assert [len(samples) for samples in picked] == [30, 30, 30]
    assert torch.equal(picked[0].images, picked[1].images)
    assert not torch.equal(picked[0].images, picked[2].images)
    assert not torch.equal(picked[0].images, worlds[0].test.images[:30])
    assert watched(worlds[0], 101) is worlds[0].test is watched(worlds[0], None)


@pytest.mark.usefixtures("quick")
def test_a_clients_private_teacher_is_not_the_victim(cwd: Path) -> None:
    """Two epochs of the teacher and three of the student: the victim is the student, and has three."""
    fed_nad = ("client=fed_nad", "client.teacher_epochs=2", "central.epochs=3")
    words = [word for word in QUICK if not word.startswith(("client.", "central.epochs"))]
    assert main(["central", *words, *fed_nad, "eraser=none"]) == OK
    folder = only(cwd / "runs")
    epochs = tiny.events(folder, "central")
    assert [(e["method"], e["epoch"]) for e in epochs] == [("victim", 1), ("victim", 2), ("victim", 3)]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["acc"], summary["asr"]) == (epochs[-1]["acc"], epochs[-1]["asr"])


@pytest.mark.usefixtures("quick")
def test_an_interrupted_central_run_goes_on(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its second eraser: resumed, it keeps the first result, and ends like one that nobody disturbed."""
    assert main(["central", *QUICK, ERASERS, "output=whole"]) == OK
    original = central.try_eraser

    def stopping(world: Any, victim: Any, before: Any, name: str, *rest: Any) -> Any:
        if name == "reinit_head":
            rest[-1].log("central", round=0, method=name, epoch=1, acc=0.0, asr=0.0)
            raise KeyboardInterrupt
        return original(world, victim, before, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(central, "try_eraser", stopping)
        assert main(["central", *QUICK, ERASERS]) == 130
    [config] = (cwd / "runs").rglob("config.yaml")
    assert main(["resume", str(config.parent)]) == OK
    assert tiny.numbers(config.parent) == tiny.numbers(only(cwd / "whole"))


@pytest.mark.usefixtures("quick")
def test_seeds_are_averaged_and_a_failed_one_is_told(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds make mean ± interval; a job that can't run makes the status 1."""
    assert main(["central", "-m", *QUICK, "erasers=[fine_tune]", "seed=0,1", "name=two"]) == OK
    shown = capsys.readouterr().out
    assert "2 seeds" in shown
    assert shown.count("±") >= 4
    assert main(["central", "-m", *QUICK, "erasers=[fine_tune]", "trigger.size=3,500"]) == FAILED
    assert "trigger.size=500" in capsys.readouterr().err


def test_the_pool_is_all_that_the_clients_hold() -> None:
    """Every sample of the training set that is not the server's clean set, once."""
    world = execution.prepare(tiny.tiny("data.clean_fraction=0.1"))
    assert len(pooled(world)) == 270
    assert world.clean is not None
    both = torch.cat([pooled(world).images, world.clean.images]).flatten(1)
    assert torch.equal(both.double().sum(1).sort().values, world.train.images.flatten(1).double().sum(1).sort().values)


def test_the_budget_of_a_baseline_is_that_of_the_federation() -> None:
    """3 rounds × 4 of 6 clients × 3 epochs are 6 passes over the data; half of the clients poison half of theirs."""
    plan = equal_budget(execution.prepare(tiny.tiny("client.epochs=3", "client.lr=0.07", "partition=iid")))
    assert plan.epochs == 6
    assert plan.lr == 0.07
    assert plan.poison_rate == pytest.approx(0.25, abs=0.01)
    assert equal_budget(execution.prepare(tiny.tiny("attack=none"))).poison_rate == 0


@pytest.mark.usefixtures("quick")
def test_baselines_run_beside_a_federation_and_survive_its_interruption(cwd: Path, monkeypatch: Any) -> None:
    """The federation's own numbers are untouched; an interruption inside the baselines repeats only these."""
    assert main(["run", *tiny.TINY, "output=plain"]) == OK
    words = ["run", *tiny.TINY, "baselines=[fine_tune,reinit_head]"]
    assert main([*words, "output=whole"]) == OK
    whole = only(cwd / "whole")
    assert tiny.numbers(whole)[:3] == tiny.numbers(only(cwd / "plain"))
    assert [e["eraser"] for e in tiny.events(whole, "erase")] == ["fine_tune", "reinit_head"]
    assert [row["eraser"] for row in json.loads((whole / "summary.json").read_text())["baselines"]] == [
        *("fine_tune", "reinit_head")
    ]
    with monkeypatch.context() as patch:
        patch.setattr(central, "try_eraser", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert main(words) == 130
    [config] = (cwd / "runs").rglob("config.yaml")
    assert main(["resume", str(config.parent)]) == OK
    assert tiny.numbers(config.parent) == tiny.numbers(whole)


def test_intervals_by_hand() -> None:
    """Of 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.3027: half an interval is 4.3027/√3 = 2.484."""
    found = interval([1.0, 2.0, 3.0, None])
    assert found is not None
    assert found == pytest.approx((2.0, 2.4841), rel=1e-4)
    assert interval([0.5]) == (0.5, None)
    assert interval([None]) is None
    assert cell("acc", [None]) == "–"
    assert cell("seconds", [1.25]) == "1.2"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("erasers=nad", "erasers"),
        ("erasers=every", "erasers"),
        ("erasers=[nda]", "erasers"),
        ("baselines=[nad,7]", "baselines"),
        ("central.epochs=0", "central.epochs"),
        ("central.poison_rate=2", "central.poison_rate"),
        ("central.clean_label_rate=1.1", "central.clean_label_rate"),
        ("central.track.every=0", "central.track.every"),
        ("central.track.every=1.5", "central.track.every"),
        ("central.track.images=0", "central.track.images"),
        ("central.track.image=9", "central.track.image"),
    ],
)
def test_strange_wishes_are_refused(line: str, key: str, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the key, status 2, no folder."""
    assert main(["central", line]) == 2
    assert capsys.readouterr().err.startswith(f"fl-sim: {key}")
    assert not (cwd / "runs").exists()


@pytest.mark.usefixtures("quick")
def test_a_start_from_another_file_of_the_same_name_is_another_run(cwd: Path) -> None:
    """What `init` names is part of a victim's and of a sweep's identity by its content, not by its path."""
    from fl_sim.build import config_hash

    Path("start.pt").write_bytes(b"one")
    config = tiny.tiny("init=start.pt")
    before = victim_hash(config), config_hash(config)
    assert (victim_hash(config), config_hash(config)) == before
    Path("start.pt").write_bytes(b"two")
    assert not set(before) & {victim_hash(config), config_hash(config)}


@pytest.mark.usefixtures("quick")
def test_a_damaged_victim_is_trained_anew(cwd: Path) -> None:
    """A cache must never stand in the way."""
    words = ["central", *QUICK, "erasers=[fine_tune]"]
    assert main([*words, "name=first"]) == OK
    [path] = (cwd / "runs/victims").glob("*.pt")
    path.write_bytes(b"junk")
    assert main([*words, "name=second"]) == OK
    first, second = (tiny.numbers(done.parent) for done in sorted((cwd / "runs").rglob("done")))
    assert first == second
