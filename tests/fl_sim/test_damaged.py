"""Run folders whose files hold what no run has written: each is refused in a line that names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fl_sim import central, execution
from fl_sim.checkpoint import Checkpoints, check_checkpoint, load_tensors, save_tensors
from fl_sim.errors import RunError
from fl_sim.folder import read_json
from fl_sim.report.reading import Run, read_run

FEDERATED: dict[str, Any] = {
    "rounds": 3,
    "acc": 0.9,
    "asr": None,
    "acc_max": 0.9,
    "asr_max": None,
    "seconds": 2.5,
    "erasings": [{"eraser": "clp", "round": 2, "accepted": True, "acc_before": 0.9, "acc": 0.8, "asr_before": None}],
}
CENTRAL: dict[str, Any] = {
    "acc": None,
    "asr": None,
    "seconds": 1,
    "erasers": [{"eraser": "clp", "acc": 0.5, "der": None}],
    "detections": [{"model": "victim", "detector": "scan", "auroc": None, "reason": "no images", "seconds": 1.0}],
}


def finished(folder: Path, summary: object, command: str = "run") -> Path:
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "meta.json").write_text(json.dumps({"argv": ["fl-sim", command]}))
    (folder / "done").touch()
    return folder


def test_a_sound_summary_is_found(tmp_path: Path) -> None:
    assert execution.found(finished(tmp_path, FEDERATED)) == FEDERATED
    assert execution.found(finished(tmp_path, CENTRAL, "central")) == CENTRAL


@pytest.mark.parametrize(
    ("summary", "command", "said"),
    [
        ({"a": 1}, "run", "lacks 'rounds'"),
        (FEDERATED | {"acc": "x"}, "run", "'acc' is 'x'"),
        (FEDERATED | {"seconds": None}, "run", "lacks 'seconds'"),
        (FEDERATED | {"erasings": [{"eraser": "clp"}]}, "run", "lacks 'accepted' in its erasings"),
        (FEDERATED | {"erasings": None}, "run", "erasings are not a list"),
        (FEDERATED, "central", "erasers are not a list"),
        (CENTRAL, "run", "lacks 'rounds'"),
        (CENTRAL | {"erasers": [{"eraser": "clp", "acc": "x"}]}, "central", "'acc' is 'x' in its erasers"),
        (CENTRAL | {"detections": [{"model": "victim"}]}, "central", "lacks 'detector' in its detections"),
    ],
)
def test_a_damaged_summary_of_a_finished_run_is_said(tmp_path: Path, summary: Any, command: str, said: str) -> None:
    with pytest.raises(RunError, match=said) as error:
        execution.found(finished(tmp_path, summary, command))
    assert str(tmp_path / "summary.json") in str(error.value)


def test_json_nested_too_deeply_is_said(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text("[" * 100_000)
    with pytest.raises(RunError, match=r"meta\.json: it is nested too deeply"):
        read_json(tmp_path / "meta.json")


def test_a_pipe_in_place_of_a_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    for read in (read_json, load_tensors):
        with pytest.raises(RunError, match="file: it is not a file"):
            read(tmp_path / "file")


def test_a_pipe_in_place_of_meta_json_is_not_read_by_a_report(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "meta.json")
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.yaml").write_text("choices: {}")
    assert isinstance(read_run(tmp_path), Run)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\n" * 60_000, "more than 256 KiB"),
        ("a: &a [1]\nb: [*a, *a]\nchoices: {}\n", "aliases"),
        ("choices: null\n", "choices are not a list of groups"),
        ("choices: {}\neraser: {}\n", "choices don't say which eraser was chosen"),
        ("choices: {data: [1]}\n", "choices don't say which data was chosen"),
        ("[" * 20_000, "can't read"),
    ],
)
def test_a_damaged_configuration_is_said(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RunError, match=said):
        execution.read_config(tmp_path)


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"event": "erase"}, "lacks 'eraser'"),
        ({"event": "erase", "eraser": ["x"]}, "'eraser' is"),
        ({"event": "detection"}, "lacks 'model'"),
        ({"event": "central"}, "lacks its method"),
        ({"event": "round", "round": 1}, "event 'round', which fl-sim central does not write"),
    ],
)
def test_a_damaged_event_of_a_central_run_is_said_and_nothing_is_lost(
    tmp_path: Path, event: dict[str, Any], said: str
) -> None:
    """A federated run whose `meta.json` says otherwise loses no rounds, either."""
    lines = "".join(json.dumps(each) + "\n" for each in ({"event": "central", "method": "victim"}, event))
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(RunError, match=f"line 2 is damaged, .*{said}"):
        central._kept(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == lines


@pytest.fixture(scope="module")
def sound() -> dict[str, Any]:
    """What a checkpoint of `counting` holds."""
    vector = torch.zeros(6)
    return {"round": 2, "metrics_length": 10, "vector": vector, "previous": vector, "counters": counters(counting())}


def counting() -> nn.Module:
    return nn.BatchNorm1d(3)


def counters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"num_batches_tracked": model.state_dict()["num_batches_tracked"]}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vector": torch.zeros(6).to_sparse()}, "vector is not a plain vector"),
        ({"vector": torch.zeros(6, requires_grad=True)}, "vector is not a plain vector"),
        ({"vector": torch.zeros(2, 3)}, "vector is not a plain vector"),
        ({"vector": torch.zeros(6, device="meta")}, "vector is not a plain vector"),
        ({"vector": "x"}, "vector is not a plain vector"),
        ({"previous": torch.zeros(5)}, "another length"),
        ({"round": -5}, "round=-5"),
        ({"round": float("inf")}, "round=inf"),
        ({"metrics_length": -1}, "metrics_length=-1"),
        ({"counters": {"x": 1}}, "counters are not plain tensors"),
    ],
)
def test_a_damaged_checkpoint_is_said(tmp_path: Path, sound: dict[str, Any], change: dict[str, Any], said: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(sound["round"], sound | change, {})
    content = load_tensors(tmp_path / "checkpoint.pt") | change
    save_tensors(tmp_path / "checkpoint.pt", content)
    with pytest.raises(RunError, match=said):
        checkpoints.load()
    with pytest.raises(RunError, match=said):
        check_checkpoint(tmp_path, counting(), 3)


def test_a_checkpoint_must_be_of_the_model_and_within_the_rounds(tmp_path: Path, sound: dict[str, Any]) -> None:
    check_checkpoint(tmp_path, counting(), 3)  # there is none yet
    Checkpoints(tmp_path).save(2, sound, {})
    check_checkpoint(tmp_path, counting(), 2)
    with pytest.raises(RunError, match="2 rounds are done, but its configuration has rounds=1"):
        check_checkpoint(tmp_path, counting(), 1)
    with pytest.raises(RunError, match="counters are not the model's"):
        check_checkpoint(tmp_path, nn.Linear(2, 2), 3)


def test_a_federated_run_does_not_begin_over_a_central_record(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "central", "round": 0, "method": "victim"}\n')
    with pytest.raises(RunError, match=r"its metrics\.jsonl is of fl-sim central"):
        execution._check_record(tmp_path)
