"""Trackers: what they are told, that an interruption leaves no trace in them, and what each program reads from them."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from dashboards import READERS, mlflow_run, of_tensorboard

from fl_sim import build, central, execution
from fl_sim.cli import OK, USAGE, main
from fl_sim.composing import compose_config
from fl_sim.errors import ConfigError, RunError
from fl_sim.protocols import Follower
from fl_sim.trackers.following import Guarded
from fl_sim.trackers.packages import check_installed
from fl_sim.trackers.scalars import Scalar, mark, scalars, settings
from fl_sim.tracking import read_metrics

PROGRAMS = ("tensorboard", "wandb", "mlflow")


# From an event to points ----------------------------------------------------------------------------------------------


def points(**event: Any) -> dict[tuple[str, int], float]:
    return {(each.tag, each.step): each.value for each in scalars(event)}


def test_the_numbers_of_a_round() -> None:
    """Each under `round/` at its round; words, unknown values and a number for each client are no curves."""
    event = {"acc": 0.5, "asr": None, "clients": 4, "loss": float("nan"), "erasing_decision": "due", "client_accs": {}}
    assert points(event="round", round=3, **event) == {("round/acc", 3): 0.5, ("round/clients", 3): 4.0}
    assert points(event="round", round=3, client_accs={"7": 0.5}, client_acc=0.5) == {("round/client_acc", 3): 0.5}


def test_what_has_parts_is_a_curve_for_each() -> None:
    """A live run hands over tuples, the file gives lists back: the same curves."""
    for accs in ((0.5, None, 1), [0.5, None, 1]):
        assert points(event="round", round=2, acc_per_class=accs) == {
            ("round/acc_per_class/0", 2): 0.5,
            ("round/acc_per_class/2", 2): 1.0,
        }
    assert points(event="round", round=2, refused_for={"not a number!": 2}) == {
        ("round/refused_for/not a number_", 2): 2.0
    }


def test_erasings_epochs_and_detections_have_places_of_their_own() -> None:
    """An erasing in a federation is at its round; a central eraser's result has no round and stands under its name."""
    erase = {"event": "erase", "eraser": "nad", "asr_before": 0.9, "asr": 0.1, "accepted": True}
    assert points(**erase, round=4) == {("erase/asr_before", 4): 0.9, ("erase/asr", 4): 0.1, ("erase/accepted", 4): 1.0}
    assert ("erasers/nad/asr", 0) in points(**erase, round=0)
    assert points(event="central", round=0, method="victim", epoch=7, acc=0.5) == {("central/victim/acc", 7): 0.5}
    found = points(event="detection", round=3, model="final", detector="ntd", auroc=0.75)
    assert found == {("detection/final/ntd/auroc", 3): 0.75}


def test_what_is_said_in_words() -> None:
    erase = {"event": "erase", "round": 4, "eraser": "nad", "acc_before": 0.9, "asr_before": 1.0, "acc": 0.8}
    assert mark(erase | {"asr": 0.25, "accepted": True}) == ("erasings", "nad: ACC 0.900 → 0.800, ASR 1.000 → 0.250")
    assert mark(erase | {"asr": None, "accepted": False, "reason": "NaN"}) == (
        "erasings",
        "nad: ACC 0.900 → 0.800, ASR 1.000 → –; refused: NaN",
    )
    failed = {"event": "client_failed", "round": 1, "client": 3, "reason": "ValueError: no"}
    assert mark(failed) == ("clients that failed", "client 3: ValueError: no")
    assert points(**failed) == {}  # whose number it is makes no curve; how many were refused is in the round's own
    refused = {"event": "client_refused", "round": 1, "client": 3, "kind": "norm", "reason": "too long"}
    assert mark(refused) == ("updates refused", "client 3 (norm): too long")
    assert mark({"event": "round", "round": 1}) is None


def test_a_configuration_as_flat_keys() -> None:
    """Choices by group, numbers as numbers, and nothing of `_target_`, paper or fidelity."""
    flat = settings(compose_config(["eraser=nad", "eraser.lr=0.5", "seed=3"]))
    assert (flat["eraser"], flat["eraser.lr"], flat["seed"], flat["seeds.data"], flat["attack"]) == (
        *("nad", 0.5, 3, 3),
        "model_replacement",
    )
    assert flat["init"] == "null"
    assert not [key for key in flat if "_target_" in key or key.endswith((".paper", ".fidelity"))]
    assert all(isinstance(value, (bool, int, float, str)) for value in flat.values())


# Following the record -------------------------------------------------------------------------------------------------

OUTSIDE = '''\
"""Trackers of a user's own."""

import json


class Copy:
    """Copies what it is told."""

    def __init__(self, folder, config):
        self.path, self.name = folder / "copy.jsonl", config["name"]

    def rebuild(self, events):
        self.path.write_text("")
        for event in events:
            self.write(event)

    def log(self, event, **fields):
        self.write({"event": event} | fields)

    def end(self, summary):
        self.write({"event": "end", "acc": summary["acc"]})

    def close(self):
        with (self.path.parent / "closed").open("a") as file:
            file.write("closed\\n")

    def write(self, event):
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\\n")


class Old:
    """Opens a file at once and knows no more than to log."""

    def __init__(self, folder):
        self.path = folder / "old.txt"
        self.path.write_text("")

    def log(self, event, **fields):
        self.path.write_text(self.path.read_text() + f"{event}\\n")


class Failing(Old):
    """Fails in the second round."""

    def log(self, event, **fields):
        if fields["round"] == 2:
            raise OSError("the disk\\nis full")
        super().log(event, **fields)


class Unwilling(Copy):
    """Can't begin."""

    def rebuild(self, events):
        raise ValueError("who are you?")
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The words that choose one of the trackers above."""
    (tmp_path / "my_trackers.py").write_text(OUTSIDE)
    conf = tmp_path / "my_conf" / "tracker"
    conf.mkdir(parents=True)
    for name in ("Copy", "Old", "Failing", "Unwilling"):
        (conf / f"{name.lower()}.yaml").write_text(f"_target_: my_trackers.{name}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda name: (f"hydra.searchpath=[file://{conf.parent}]", f"tracker={name}")


def copied(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "copy.jsonl").read_text().splitlines()]


def record(folder: Path) -> list[dict[str, Any]]:
    """What a follower must hold: the record, and the end."""
    return [*tiny.events(folder), {"event": "end", "acc": json.loads((folder / "summary.json").read_text())["acc"]}]


RUN = (*tiny.ERASING, "rounds=4")


@pytest.mark.parametrize("extra", [(), ("baselines=[clp]", "detection=scale_up")])
def test_a_follower_is_told_all_that_the_record_holds(outside: Any, tmp_path: Path, extra: tuple[str, ...]) -> None:
    """Rounds, erasings, detections, and the baselines beside them, in order; then the end. It is closed once."""
    few = ("central.epochs=1", f"output={tmp_path / 'out'}") if extra else ()
    folder = tiny.run(tmp_path / "run", *RUN, *outside("copy"), *extra, *few)
    assert copied(folder) == record(folder)
    kinds = {event["event"] for event in tiny.events(folder)}
    assert kinds == {"round", "erase", *(("central", "detection") if extra else ())}
    assert (folder / "closed").read_text() == "closed\n"
    assert build.trackers_of.cache_info().currsize == 0


@pytest.mark.parametrize(
    ("step", "at", "after"),
    [
        ("_round", 1, False),  # nothing was logged
        ("_erase", 2, True),  # the erasing was logged, its round was not
        ("_save", 3, False),  # the round was logged, its checkpoint not written
        ("_save", 4, True),  # all rounds done, the end not told
    ],
)
def test_an_interruption_leaves_no_trace(outside: Any, tmp_path: Path, step: str, at: int, after: bool) -> None:
    """No line twice, none lost, wherever it was: the copy is the record."""
    overrides = (*RUN, "checkpoint.every=3", *outside("copy"))
    folder = tiny.interrupted(tmp_path / "run", step, at, *overrides, after=after)
    assert (folder / "closed").read_text() == "closed\n"
    execution.resume(folder)
    assert copied(folder) == record(folder)
    assert [event["round"] for event in copied(folder) if event["event"] == "round"] == [1, 2, 3, 4]


def test_an_interrupted_central_run_leaves_no_trace_either(
    outside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second eraser stops half-way; what it had logged goes, what the first one had stays."""
    original = central.try_eraser

    def breaking(*rest: Any) -> Any:
        if rest[3] == "reinit_head":
            rest[-1].log("central", round=0, method="reinit_head", epoch=1, acc=0.0, asr=0.0)
            raise tiny.Interrupted
        return original(*rest)

    folder = tmp_path / "run"
    folder.mkdir()
    few = ("central.epochs=2", "central.track.every=2", "erasers=[clp,reinit_head]", f"output={tmp_path}")
    words = (*tiny.TINY, *few, *outside("copy"))
    with monkeypatch.context() as patch:
        patch.setattr(central, "try_eraser", breaking)
        with pytest.raises(tiny.Interrupted):
            execution.start(compose_config(words), folder, ["fl-sim", "central"])
    assert (copied(folder)[-1]["method"], copied(folder)[-1]["acc"]) == ("reinit_head", 0.0)
    execution.resume(folder)
    assert copied(folder) == record(folder)
    assert [event["eraser"] for event in copied(folder) if event["event"] == "erase"] == ["clp", "reinit_head"]


def test_a_tracker_that_only_logs_is_built_when_the_run_folder_is_there(outside: Any, tmp_path: Path) -> None:
    """It may open files as soon as it is built, so checking the configuration must not build it."""
    execution.prepare(tiny.tiny(*outside("old"), f"output={tmp_path / 'nowhere'}"))
    folder = tiny.run(tmp_path / "run", *RUN, *outside("old"))
    assert (folder / "old.txt").read_text().split() == [event["event"] for event in tiny.events(folder)]


def test_a_tracker_that_fails_does_not_end_the_run(
    outside: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr, once; it is told nothing more, and the record is whole."""
    folder = tiny.run(tmp_path / "run", *outside("failing"))
    assert (folder / "old.txt").read_text() == "round\n"
    assert [event["round"] for event in tiny.events(folder, "round")] == [1, 2, 3]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "tracker=failing has failed and is told nothing more; the run goes on: OSError: the disk is full" in said


def test_a_tracker_that_cannot_begin_ends_the_run_before_it_has_cost_anything(outside: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^tracker=unwilling can't begin: ValueError: who are you\?$"):
        tiny.run(tmp_path / "run", *outside("unwilling"))
    assert tiny.events(tmp_path / "run") == []


def test_a_guarded_tracker_follows() -> None:
    """What `rebuild` looks for; a tracker that only logs is not bothered with the rest."""

    class Silent:
        def log(self, event: str, **fields: object) -> None:
            raise AssertionError

    guarded = Guarded(Silent(), "silent")
    assert isinstance(guarded, Follower)
    guarded.rebuild([{"event": "round"}])
    guarded.end({})
    guarded.close()


# The packages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_missing_package_is_one_line_that_names_the_extra(
    name: str, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before there is a run folder, with exit status 2."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: None if found == name else find(found))
    assert main(["run", f"tracker={name}"]) == USAGE
    line = f'fl-sim: tracker={name}: needs {name}, which is not installed: pip install "fl-sim[{name}]"\n'
    assert capsys.readouterr().err == line
    assert list(cwd.iterdir()) == []


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python takes any folder for a package without files; wandb leaves folders called wandb."""
    (tmp_path / "not_installed").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.util.find_spec("not_installed") is not None
    with pytest.raises(ConfigError, match=r"fl-sim\[not_installed\]"):
        check_installed("not_installed")
    check_installed("yaml")


@pytest.mark.parametrize(
    ("name", "words", "key"),
    [
        ("wandb", "tracker.mode=shared", "tracker.mode"),
        ("wandb", "tracker.project=''", "tracker.project"),
        ("wandb", "tracker.entity=[1]", "tracker.entity"),
        ("mlflow", "tracker.uri=host", "tracker.uri"),
        ("mlflow", "tracker.experiment=true", "tracker.experiment"),
    ],
)
def test_a_tracker_key_is_checked_before_a_run_folder_exists(
    name: str, words: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like any other component's."""
    monkeypatch.setattr("fl_sim.trackers.packages.check_installed", lambda package: None)
    with pytest.raises(ConfigError) as caught:
        execution.prepare(compose_config([f"tracker={name}", words]))
    assert caught.value.key == key


def rounded(found: Iterator[Scalar]) -> Counter[tuple[str, int, str]]:
    """Points as a bag, so that one that is there twice is seen; as float32, which is what TensorBoard keeps."""
    return Counter((each.tag, each.step, str(np.float32(each.value))) for each in found if each.tag[:6] != "final/")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")  # the packages' own
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_program_reads_is_the_record(name: str, tmp_path: Path) -> None:
    """Every number of metrics.jsonl once and nothing else, after an interruption, and at last the final scores.

    Interrupted after the third round was logged and before its checkpoint: what was logged of it must go.
    """
    pytest.importorskip(name)
    overrides = (*RUN, f"tracker={name}", f"output={tmp_path}", "checkpoint.every=2")
    folder = tiny.interrupted(tmp_path / "run", "_save", 4, *overrides, after=False)
    execution.resume(folder)
    expected = rounded(each for event in read_metrics(folder) for each in scalars(event))
    assert expected.total() > 50
    assert rounded(READERS[name](folder)) == expected
    if name == "mlflow":
        run, _ = mlflow_run(folder)
        assert (run.info.status, run.data.params["eraser.min_steps"]) == ("FINISHED", "4")
    summary = json.loads((folder / "summary.json").read_text())
    final = {each.tag: each.value for each in READERS[name](folder) if each.tag.startswith("final/")}
    assert final == pytest.approx({"final/acc": summary["acc"], "final/asr": summary["asr"]})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["run", *(("mlflow.db", "mlflow.lock") if name == "mlflow" else ())]
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_an_mlflow_run_that_nobody_wrote_down_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process had been killed between the making of the run and the writing of its id."""
    pytest.importorskip("mlflow")
    folders = [tmp_path / "other", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr("fl_sim.trackers.mlflow.write_text", lambda *_: 1 / 0)
        patch.setattr("fl_sim.trackers.mlflow.MLflow._finish", lambda *_: None)
        for folder in folders:
            with pytest.raises(RunError, match="can't begin"):
                tiny.run(folder, *RUN, "tracker=mlflow", f"output={tmp_path}")
    execution.resume(folders[1])
    finished, client = mlflow_run(folders[1])
    other, _ = mlflow_run(folders[0])
    assert (finished.info.status, other.info.status) == ("FINISHED", "RUNNING")
    assert client.get_run((folders[1] / "mlflow_id").read_text()).info.run_id == finished.info.run_id


def test_tensorboard_shows_the_configuration_and_the_erasings(tmp_path: Path) -> None:
    """The table of hyperparameters has the run's row, with its end; each erasing is a text at its round."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plugin = importlib.import_module("tensorboard.plugins.hparams.plugin_data_pb2").HParamsPluginData
    folder = tiny.run(tmp_path / "run", *RUN, "tracker=tensorboard", "client.lr=0.25")
    found = reading.EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    found.Reload()
    texts = [(each.step, each.tensor_proto.string_val[0].decode()) for each in found.Tensors("erasings/text_summary")]
    said = [mark(event) for event in tiny.events(folder, "erase")]
    assert texts == [(2, said[0][1]), (4, said[1][1])]  # type: ignore[index]
    content = {tag: plugin.FromString(data.plugin_data.content) for tag, data in found.summary_metadata.items()}
    row = content["_hparams_/session_start_info"].session_start_info.hparams
    assert (row["eraser"].string_value, row["client.lr"].number_value, row["seed"].number_value) == (
        *("fine_tune", 0.25),
        0,
    )
    assert content["_hparams_/session_end_info"].HasField("session_end_info")
    columns = {each.name.tag for each in content["_hparams_/experiment"].experiment.metric_infos}
    assert columns == {"final/acc", "final/asr"}


def test_a_central_run_in_tensorboard(cwd: Path) -> None:
    """Epochs of the victim and of the erasers, and what became of each, by the command line."""
    pytest.importorskip("tensorboard")
    words = [*tiny.TINY, *tiny.ERASING, "central.epochs=2", "tracker=tensorboard", "output=out"]
    assert main(["central", *words]) == OK
    [folder] = [path.parent for path in (cwd / "out").rglob("done")]
    expected = rounded(each for event in read_metrics(folder) for each in scalars(event))
    assert {"central/victim/acc", "central/fine_tune/acc", "erasers/fine_tune/asr_before"} <= {t for t, *_ in expected}
    assert rounded(of_tensorboard(folder)) == expected
