"""Run folders whose files hold what no run has written: each is refused in a line that names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fl_sim import execution
from fl_sim.checkpoint import load_tensors
from fl_sim.errors import RunError
from fl_sim.folder import read_json

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
