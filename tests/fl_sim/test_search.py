"""Search by Optuna: what it tries, how a trial is judged, and that an interrupted one goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from fl_sim import launchers
from fl_sim.cli import OK, USAGE, main
from fl_sim.errors import RunError
from fl_sim.search import JOURNAL, Choices, Numbers, Sampler, Search, Study, Trial, judged
from fl_sim.sweep import Job, Outcome

Capture = pytest.CaptureFixture[str]
SPACE = {"x": Numbers(0, 10), "n": Numbers(2, 8, 3, whole=True), "kind": Choices(("a", "b"))}


def search(**given: Any) -> Search:
    return Search(**({"optimize": "test_asr", "sampler": Sampler("random", 0)} | given))


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    pytest.importorskip("optuna")


def result(number: Any) -> Trial:
    return Trial({}, (float(number),))


def test_trials_stay_within_the_space_and_are_typed_as_overrides(tmp_path: Path) -> None:
    """Numbers so that they read back as the same number, choices as they were typed."""
    study = Study(search(n_trials=30), SPACE, tmp_path)
    for trial in study.ask(30):
        words = study.words(trial)
        assert 0 <= float(words["x"]) <= 10
        assert float(words["x"]) == trial.params["x"]
        assert int(words["n"]) in (2, 5, 8)
        assert words["kind"] in ("a", "b")
        study.tell(trial, result(trial.params["x"]))
    assert study.left == 0
    [best] = study.best()
    assert best.values == (min(float(trial.params["x"]) for trial in study._study.trials),)
    content = yaml.safe_load(study.write().read_text())
    assert content["best_value"] == best.values[0]
    assert content["best_params"] == best.params
    assert (content["optimize"], content["trials"]) == (["test_asr"], 30)


def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path) -> None:
    """Two trials told, one failed, two under way when it was killed: four of six are left, and those two come first."""
    first = Study(search(n_trials=6), SPACE, tmp_path)
    asked = first.ask(5)
    for trial in asked[:2]:
        first.tell(trial, result(1.0))
    first.tell(asked[2], Trial({}, None, "failed"))
    again = Study(search(n_trials=6), SPACE, tmp_path)
    assert again.left == 4
    taken_up = [again.words(trial) for trial in again.ask(2)]
    assert taken_up == [first.words(trial) for trial in asked[3:]]
    fresh = [again.words(trial) for trial in again.ask(2)]
    seen = [first.words(trial) for trial in asked]
    assert not any(words in seen for words in fresh)  # a seed does not make it draw its beginning once more


def test_another_search_in_the_same_place_is_refused(tmp_path: Path) -> None:
    """Other objectives or other choices for the same key would mix what can't be compared."""
    study = Study(search(), SPACE, tmp_path)
    study.tell(study.ask(1)[0], result(1.0))
    with pytest.raises(RunError, match="other objectives"):
        Study(search(optimize="test_acc"), SPACE, tmp_path)
    other = Study(search(), SPACE | {"kind": Choices(("a", "c"))}, tmp_path)
    with pytest.raises(RunError, match="choose another name"):
        other.ask(1)
    assert (tmp_path / JOURNAL).exists()


def test_several_objectives_give_what_no_other_beats(tmp_path: Path) -> None:
    """(0.9, 0.5), (0.8, 0.1) and (0.7, 0.4), ACC up and ASR down: the second beats the third."""
    study = Study(search(optimize=("test_acc", "test_asr")), SPACE, tmp_path)
    for trial, values in zip(study.ask(3), ((0.9, 0.5), (0.8, 0.1), (0.7, 0.4)), strict=True):
        study.tell(trial, Trial({}, values))
    assert sorted(trial.values or () for trial in study.best()) == [(0.8, 0.1), (0.9, 0.5)]
    assert len(yaml.safe_load(study.write().read_text())["solutions"]) == 2


def test_a_trial_is_the_mean_over_its_seeds(tmp_path: Path) -> None:
    """ASR 0.2 and 0.4: 0.3. One failed run fails the trial; so does a number that the run has not recorded."""
    good = [Outcome(("a",), "finished", {"acc": 0.9, "asr": asr}) for asr in (0.2, 0.4)]
    assert judged(search(), {}, good).values == pytest.approx((0.3,))
    both = judged(search(optimize=("test_acc", "test_asr")), {}, good)
    assert both.values == pytest.approx((0.9, 0.3))
    failed = judged(search(), {}, [*good, Outcome(("a",), "failed: for a reason")])
    assert (failed.values, failed.reason) == (None, "failed: for a reason")
    nothing = judged(search(), {}, [Outcome(("a",), "finished", {"acc": 0.9, "asr": None})])
    assert (nothing.values, nothing.reason) == (None, "the run has recorded no test_asr")
    lines = ('{"event": "round", "clean_acc": 0.5}', '{"event": "round", "clean_acc": 0.75}', '{"event": "erase"}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    watched = Outcome(("a",), "finished", {"acc": 0.9, "asr": 0.1}, folder=tmp_path)
    assert judged(search(optimize="clean_acc"), {}, [watched]).values == (0.75,)


WORDS = [*tiny.TINY, "name=found", "hydra/sweeper=optuna", "hydra.sweeper.optimize=test_asr"]


def test_a_search_from_its_command(cwd: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds repeat each trial; the best is found; the test set is named; a second start has nothing left to do."""
    made: list[Job] = []

    def launch(self: Any, jobs: Sequence[Job], *_: object) -> Iterator[Outcome]:
        for job in jobs:
            made.append(job)
            factor = float(next(word for word in job if word.startswith("attack.boost=")).partition("=")[2])
            yield Outcome(tuple(job), "finished", {"acc": 1.0, "asr": abs(factor - 3) / 10, "asr_max": 1.0})

    monkeypatch.setattr(launchers.Basic, "launch", launch)
    command = ["run", "-m", *WORDS, "attack.boost=range(1,6)", "seed=0,1", "hydra.sweeper.n_trials=12"]
    assert main([*command, "hydra.sweeper.sampler.seed=1"]) == OK
    out = capsys.readouterr().out
    assert "test_asr: this search selects by the test set; its best values are no test results" in out
    assert {word for job in made for word in job if word.startswith("seed=")} == {"seed=0", "seed=1"}
    assert "best: attack.boost=3: test_asr 0.0000" in out
    folder = cwd / "runs/sweeps/found"
    assert yaml.safe_load((folder / "optimization_results.yaml").read_text())["best_params"] == {"attack.boost": "3"}
    before = len(made)
    assert main(command) == OK
    assert len(made) == before
    assert main(["central", "-m", *WORDS, "attack.boost=range(1,6)"]) == USAGE
    assert "is for fl-sim run" in capsys.readouterr().err


def test_a_search_of_real_runs(cwd: Path, capsys: Capture) -> None:
    """Two trials, executed here, kept where every sweep keeps its runs."""
    command = ["run", "-m", *WORDS, "rounds=1", "client.lr=interval(0.01,0.1)", "hydra.sweeper.n_trials=2"]
    assert main(command) == OK
    assert len(list((cwd / "runs/sweeps/found").glob("*/done"))) == 2
    assert "best: client.lr=0.0" in capsys.readouterr().out
