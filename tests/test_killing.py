"""Fifty kills by SIGKILL: whatever a run was at, it goes on as if nothing had happened."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import killing
import pytest

from fl_sim.engines.ray import FOLDER


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    """Model, record, summary, curves, checkpoint and what clients remember are those of the undisturbed run.

    A single kill is in the default suite (test_cli.py), as are interruptions at each step of a round (test_run.py).
    """
    pytest.importorskip("tensorboard")
    end = killed(50, tmp_path / "runs")
    assert end["kills"] >= 50
    assert {"training", "erasing", "evaluation", "checkpoint"} <= set(end["in"])
    assert end["temporary_files"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "words"),
    [("wandb", ["tracker=wandb"]), ("mlflow", ["tracker=mlflow"]), ("ray", ["tracker=none", "engine=ray"])],
)
def test_six_kills_change_nothing_with_programs_of_others(package: str, words: list[str], tmp_path: Path) -> None:
    """What a killed run had started (wandb's writer, all of Ray) ends without it, half of the times after a resumption.

    Ray's folder is left among the temporary files, and two of wandb's.
    """
    pytest.importorskip(package)
    end = killed(6, tmp_path / "runs", *words)
    assert end["kills"] >= 6
    assert end["stayed"] == []
    known = {"ray": f"{FOLDER}.*", "wandb": ".*wandb-(media|artifacts)", "mlflow": ""}[package]
    assert [name for name in end["temporary_files"] if not re.fullmatch(known, name)] == []
    assert end["shared_memory_files"] == []


def killed(kills: int, folder: Path, *words: str) -> dict[str, Any]:
    """Runs with so many kills in all; what was said in the end."""
    command = [sys.executable, str(Path(killing.__file__)), str(kills), str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *runs, end = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [run for run in runs if run["different"] or run["left"]]
    return dict(end)
