"""Sweeps: restarted, killed, run by two at once, short of memory; and what their display says."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny

from fl_sim import execution, sweep
from fl_sim.cli import FAILED, OK, main
from fl_sim.packing import ThisMachine
from fl_sim.sweep import Outcome, Running, View, execute, in_turn, place, side_by_side
from fl_sim.sweep_progress import Stand, SweepProgress, in_common, last_event

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "PATIENCE", 0.05)


def job(seed: int, *more: str) -> list[str]:
    return [*tiny.TINY, f"seed={seed}", "name=sweep", *more]


def words(count: int, *more: str) -> list[str]:
    return ["run", "-m", *tiny.TINY, f"seed=range(0,{count})", "name=sweep", *more]


def marks(folder: Path) -> dict[Path, tuple[int, int]]:
    """The finished runs of a folder, with what changes if a run is finished anew."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("done")}


# Killed and restarted -------------------------------------------------------------------------------------------------


def started(cwd: Path, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "fl_sim.cli", *command],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def killed_after(process: subprocess.Popen[bytes], folder: Path, done: int, pause: float) -> None:
    """Kill a sweep without a chance to tidy up: some time after so many runs are finished."""
    deadline = time.monotonic() + 3000
    while len(marks(folder)) < done:
        assert process.poll() is None, "the sweep ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(pause)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_sweep_goes_on_and_redoes_nothing(cwd: Path, capsys: Capture) -> None:
    """Six runs, killed after the second: the same command completes them and touches none that was finished."""
    process = started(cwd, *words(6, "rounds=6"))
    killed_after(process, cwd, 2, 0.1)
    before = marks(cwd)
    assert 2 <= len(before) < 6
    assert main(words(6, "rounds=6")) == OK
    after = marks(cwd)
    assert len(after) == 6
    assert {path: after[path] for path in before} == before
    assert capsys.readouterr().out.count("│ found finished") == len(before)
    for path in after:
        assert [event["round"] for event in tiny.events(path.parent, "round")] == list(range(1, 7))


@pytest.mark.slow
def test_24_runs_killed_twice_are_completed_by_the_third_start(cwd: Path) -> None:
    """Killed at random moments, with two runs at a time; their processes go with the sweep, and no run is redone.

    What was under way then comes to the numbers of an undisturbed run.
    """
    command = words(24, "rounds=4", "--jobs", "2")
    draw = random.Random(time.time_ns())
    kept: dict[Path, tuple[int, int]] = {}
    interrupted = set[Path]()
    for least in (draw.randint(1, 8), draw.randint(9, 16)):
        killed_after(started(cwd, *command), cwd, least, draw.random())
        found = marks(cwd)
        assert {path: found[path] for path in kept} == kept
        kept = found
        interrupted |= {path.parent for path in cwd.rglob("config.yaml") if not (path.parent / "done").exists()}
    assert len(kept) < 24
    assert started(cwd, *command).wait(timeout=3000) == OK
    final = marks(cwd)
    assert len(final) == 24
    assert {path: final[path] for path in kept} == kept
    for folder in interrupted:
        seed = json.loads((folder / "meta.json").read_text())["seeds"]["train"]
        whole = execute([*tiny.TINY, f"seed={seed}", "name=whole", "rounds=4"]).folder
        assert whole is not None
        assert whole.name == folder.name
        assert tiny.numbers(folder) == tiny.numbers(whole)


def test_a_finished_run_is_found_without_its_data(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarting a sweep of a thousand must not load a thousand data sets to find that nothing is left to do."""
    assert execute(job(0)).state == "finished"
    monkeypatch.setattr(execution, "prepare", lambda *_, **__: pytest.fail("it was prepared"))
    again = execute(job(0))
    assert again.state == "found finished"
    assert again.summary is not None
    assert again.folder == place(job(0)).folder


# Two at once ----------------------------------------------------------------------------------------------------------


def test_a_run_that_another_is_at_comes_last_and_is_not_done_twice(cwd: Path) -> None:
    """Of three runs the first is held: it is said to be busy, the others are made, and it comes when it is free."""
    folder = place(job(0)).folder
    folder.mkdir(parents=True)
    views: list[View] = []
    coming = in_turn([job(0), job(1), job(2)], lambda folder: nullcontext(), watch=views.append)
    with execution.alone(folder):
        first = next(coming)
        assert (first.busy, first.summary) == (True, None)
        assert first.state == f"{folder} is in use by another process"
        assert [next(coming).state for _ in range(2)] == ["finished", "finished"]
        assert not (folder / "config.yaml").exists()
    last = next(coming)
    assert (last.job, last.state) == (tuple(job(0)), "finished")
    assert next(coming, None) is None


@pytest.mark.slow
def test_two_sweeps_on_one_folder_share_the_work(cwd: Path, capsys: Capture) -> None:
    """Two processes with the same command at the same time: both end well, each run was made once, by one of them."""
    other = started(cwd, *words(4, "rounds=6"))
    deadline = time.monotonic() + 300
    while not list(cwd.rglob("metrics.jsonl")):
        assert time.monotonic() < deadline
        assert other.poll() is None
        time.sleep(0.01)
    assert main(words(4, "rounds=6")) == OK
    assert other.wait(timeout=300) == OK
    done = marks(cwd)
    assert len(done) == 4
    for path in done:
        assert [event["round"] for event in tiny.events(path.parent, "round")] == list(range(1, 7))
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert "looked at again at the end" in shown.out or "found finished" in shown.out


def test_a_file_system_that_locks_no_folders_has_its_files_locked(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS refuses a folder (EBADF); a hidden file serves. One that locks nothing at all is warned of, and used."""
    real = execution.fcntl
    assert real is not None

    def flock(handle: int, how: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(9, "Bad file descriptor")
        real.flock(handle, how)

    class Nfs:
        LOCK_EX, LOCK_NB = real.LOCK_EX, real.LOCK_NB

    Nfs.flock = staticmethod(flock)  # type: ignore[attr-defined]
    folder = cwd / "run"
    folder.mkdir()
    monkeypatch.setattr(execution, "fcntl", Nfs)
    with execution.alone(folder), pytest.raises(execution.Busy), execution.alone(folder):
        pass
    with execution.alone(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]

    def nothing(handle: int, how: int) -> None:
        raise OSError(37, "No locks available")

    warned: list[str] = []
    monkeypatch.setattr(execution, "warn", warned.append)
    Nfs.flock = staticmethod(nothing)  # type: ignore[attr-defined]
    with execution.alone(folder):
        assert len(warned) == 1
        assert "No locks available" in warned[0]


# Side by side ---------------------------------------------------------------------------------------------------------


class Tight(ThisMachine):
    """A machine without any memory left."""

    def free(self) -> int | None:
        return 0


@pytest.mark.slow
def test_without_memory_runs_wait_for_each_other_and_none_for_ever(cwd: Path) -> None:
    """Two places, no memory: never two at a time, the reason is told, and both are made."""
    views: list[View] = []
    found = list(side_by_side([job(0), job(1)], 2, machine=Tight(), watch=views.append))
    assert sorted(outcome.state for outcome in found) == ["finished", "finished"]
    assert max(len(view.running) for view in views) == 1
    reasons = {view.held_up for view in views if view.held_up is not None}
    assert reasons
    assert all("of memory, 0.0 GiB is left" in reason for reason in reasons)


def test_a_killed_process_is_one_failed_run_and_the_others_go_on(cwd: Path) -> None:
    """As when memory runs out: the run is told with what to do, its slot gets another process, the rest is made."""
    victim = tuple(job(0, "rounds=10000"))
    killed: list[int] = []

    def watch(view: View) -> None:
        at_work = [each for each in view.running if each.job == victim and each.folder is not None]
        if not killed and at_work and last_event(at_work[0].folder or Path()) is not None:
            [process] = [each for each in multiprocessing.active_children() if each not in others]
            killed.append(process.pid or 0)
            os.kill(killed[0], signal.SIGKILL)

    others = multiprocessing.active_children()  # whatever an earlier test of this process has left
    found = {each.job: each for each in side_by_side([list(victim), job(1)], 1, watch=watch)}
    assert "the same command goes on" in found[victim].complaint
    assert found[victim].state.startswith("failed: a process was killed")
    assert found[tuple(job(1))].state == "finished"
    assert set(multiprocessing.active_children()) <= set(others)


# What is told ---------------------------------------------------------------------------------------------------------


def record(folder: Path, *events: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "rou')
    return folder


def test_the_last_round_is_read_from_the_end_of_a_long_record(tmp_path: Path) -> None:
    """Erasings and half a line do not count; the beginning of a record of megabytes is not read."""
    rounds = [{"event": "round", "round": t, "acc": 0.5, "asr": None, "filler": "x" * 999} for t in range(1, 200)]
    folder = record(tmp_path / "run", *rounds, {"event": "erase", "round": 200})
    last = last_event(folder)
    assert last is not None
    assert last["round"] == 199
    assert last_event(tmp_path) is None
    stand = Stand.of(Running(("seed=1",), folder, 400))
    assert (stand.done, stand.share) == (199, 199 / 400)
    assert stand.words.startswith("round 199/400  ACC 0.500")
    central = record(tmp_path / "central", {"event": "central", "round": 0, "method": "victim", "epoch": 3, "acc": 0.9})
    assert Stand.of(Running(("seed=1",), central)).words.startswith("victim, epoch 3")


def told(outcomes: Sequence[Outcome | View], jobs: int) -> list[str]:
    stream = io.StringIO()
    with SweepProgress(jobs, stream=stream, side_by_side=True) as progress:
        for each in outcomes:
            progress.ended(each) if isinstance(each, Outcome) else progress.watch(each)
    return stream.getvalue().splitlines()


def test_plain_lines_count_what_became_of_the_runs() -> None:
    """Done, found, failed, running, waiting; what is busy is none of them yet."""
    first, second = Running(("seed=0",)), Running(("seed=1",))
    lines = told(
        [
            View([first, second]),
            Outcome(("seed=0",), "finished", {}),
            View([second], "a run needs about 11.0 GiB of memory, 6.0 GiB is left"),
            Outcome(("seed=1",), "the folder is in use by another process", busy=True),
            Outcome(("seed=2",), "found finished", {}),
            Outcome(("seed=3",), "failed: for a reason"),
        ],
        5,
    )
    assert lines[0].startswith("[1/5] seed=0: finished  (1 done, 1 running, 3 waiting, about ")
    assert lines[1] == "waiting: a run needs about 11.0 GiB of memory, 6.0 GiB is left"
    assert lines[2] == "seed=1: the folder is in use by another process; looked at again at the end"
    assert lines[3].startswith("[2/5] seed=2: found finished  (1 done, 1 found finished, ")
    assert lines[4].startswith("[3/5] seed=3: failed: for a reason  (1 done, 1 found finished, 1 failed, ")


def test_plain_lines_name_a_run_by_what_varies() -> None:
    """What all runs share is said once, at the beginning."""
    jobs = [("rounds=2", "eraser=nad", f"seed={seed}") for seed in (0, 1)]
    stream = io.StringIO()
    with SweepProgress(2, stream=stream, side_by_side=False, shared=in_common(jobs)) as progress:
        progress.watch(View([Running(jobs[0])]))
        progress.ended(Outcome(jobs[0], "finished", {}))
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["2 runs of eraser=nad rounds=2", "[1/2] seed=0"]
    assert lines[2].startswith("[1/2] seed=0: finished  (1 done, ")


def test_time_left_is_what_the_work_so_far_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four runs one is done, one was taken up at round 5 and is at 10 of 20, in 125 s: 1.25 runs' work. Missing are
    two and a half: 250 s. A run that was found finished took no work."""
    clock = [1000.0]
    monkeypatch.setattr("fl_sim.sweep_progress.time.perf_counter", lambda: clock[0])
    folder = record(tmp_path / "run", {"event": "round", "round": 5})
    progress = SweepProgress(5, stream=io.StringIO(), side_by_side=True)
    running = Running(("seed=1",), folder, 20)
    progress.watch(View([running]))
    assert progress.left([Stand.of(running)]) is None
    progress.ended(Outcome(("seed=9",), "found finished", {}))
    progress.ended(Outcome(("seed=0",), "finished", {}))
    record(folder, {"event": "round", "round": 10})
    clock[0] += 125
    assert progress.left([Stand.of(running)]) == pytest.approx(250)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_one_display_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts, a line for each run that is under way by what tells it from the others, and the failed ones."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    folder = record(tmp_path / "run", {"event": "round", "round": 5, "acc": 0.25, "asr": 0.75})
    progress = SweepProgress(3, stream=stream, side_by_side=True, shared=frozenset({"rounds=20"}))
    with progress:
        progress.watch(View([Running(("rounds=20", "seed=1"), folder, 20)], "a run needs more"))
        progress.ended(Outcome(("rounds=20", "seed=0"), "failed: for a reason"))
        progress._console.print(progress._table())
    shown = stream.getvalue()
    assert "1 failed, 1 running, 1 waiting" in shown
    assert any(line.startswith("seed=1  round 5/20  ACC 0.250  ASR 0.750") for line in shown.splitlines())
    assert "failed: seed=0" in shown
    assert "waiting: a run needs more" in shown
    assert "rounds=20" not in shown


def test_failures_are_listed_with_their_reasons_and_stop_nothing(cwd: Path, capsys: Capture) -> None:
    """A centralized sweep, whose table has no line for them, lists them below it."""
    central = ["central", "-m", *tiny.TINY, "central.epochs=1", "erasers=[]", "trigger.size=500,2"]
    assert main(central) == FAILED
    shown = capsys.readouterr()
    assert "1 of 2 runs failed; the same command tries these again" in shown.out
    assert "failed: trigger.size=500" in shown.out
    assert shown.err.count("fl-sim: trigger.size=500") == 1
