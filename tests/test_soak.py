"""Two thousand rounds: what a run takes up does not grow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soaking

FLAT = ("open_files", "threads", "processes", "their_open_files", "shared_memory_files", "temporary_files")


def soaked(rounds: int, folder: Path, *words: str) -> dict[str, Any]:
    """In a process of its own, whose memory nothing else changes."""
    command = [sys.executable, str(Path(soaking.__file__)), str(rounds), str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def test_a_few_rounds_leave_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty of them: the same files, threads and shared memory in the last as in the second."""
    monkeypatch.setattr("fl_sim.summary.draw", lambda *_: None)
    monkeypatch.setattr("fl_sim.execution.draw_partitions", lambda *_: None)
    found = soaking.soaked(20, tmp_path / "run", window=1)
    assert found["rounds"] == 20
    assert {key: found["last"][key] for key in FLAT} == {key: found["first"][key] for key in FLAT}
    assert set(found["left"].values()) == {0}


@pytest.mark.slow
def test_two_thousand_rounds_take_no_more_at_the_end_than_at_the_beginning(tmp_path: Path) -> None:
    """Medians of the first hundred rounds and of the last; time is left some room, for others on the machine."""
    found = soaked(2000, tmp_path)
    first, last = found["first"], found["last"]
    assert found["rounds"] == 2000
    assert {key: last[key] for key in FLAT} == {key: first[key] for key in FLAT}
    assert last["own_bytes"] < first["own_bytes"] + (40 << 20)
    assert last["cpu_seconds"] < 1.3 * first["cpu_seconds"]
    assert set(found["left"].values()) == {0}


@pytest.mark.slow
@pytest.mark.ray
def test_two_hundred_rounds_on_ray_take_no_more_and_leave_nothing(tmp_path: Path) -> None:
    """Its processes, their files and memory too; after the run they, their files and shared memory are gone.

    Ray itself leaves some of this process's own files open: its record of events, connections.
    """
    pytest.importorskip("ray")
    found = soaked(220, tmp_path, "engine=ray", "engine.workers=2")
    first, last = found["first"], found["last"]
    assert first["processes"] > 5
    assert {key: last[key] for key in FLAT} == {key: first[key] for key in FLAT}
    assert last["own_bytes"] < first["own_bytes"] + (40 << 20)
    assert last["their_own_bytes"] < first["their_own_bytes"] + (100 << 20)
    assert found["left"].pop("open_files") <= 5
    assert set(found["left"].values()) == {0}
