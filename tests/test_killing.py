"""Fifty kills by SIGKILL: whatever a run was at, it goes on as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import killing
import pytest


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    """Model, record, summary, curves, checkpoint and what clients remember are those of the undisturbed run.

    A single kill is in the default suite (test_cli.py), as are interruptions at each step of a round (test_run.py).
    """
    pytest.importorskip("tensorboard")
    command = [sys.executable, str(Path(killing.__file__)), "50", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *runs, end = [json.loads(line) for line in done.stdout.splitlines()]
    assert end["kills"] >= 50
    assert not [run for run in runs if run["different"] or run["left"]]
    assert {"training", "erasing", "evaluation", "checkpoint"} <= set(end["in"])
