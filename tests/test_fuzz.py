"""Random bad input, of all kinds: it is used, or refused in one line; never a traceback, never half a run folder."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import damaging
import fuzzing
import pytest
import tiny

from fl_sim import execution
from fl_sim.cli import OK, USAGE, main
from fl_sim.composing import compose_config
from fl_sim.errors import ConfigError, RunError
from fl_sim.rounds import Federation

ROOT = Path(__file__).parent.parent
Capture = pytest.CaptureFixture[str]


# Configurations -------------------------------------------------------------------------------------------------------


def checked(words: list[str]) -> str | None:
    """Through the validator: None if it takes them, else its line; whatever else is raised is a bug."""
    try:
        execution.prepare(compose_config(words))
    except ConfigError as error:
        return str(error) if error.allowed else ""
    except RunError as error:
        return str(error) if "not enough memory" in str(error) else ""
    return None


def test_random_configurations_are_taken_or_refused_in_a_line(cwd: Path) -> None:
    """Fourteen, with what a user may get wrong in any of them; nothing is written."""
    found = {shlex.join(words): checked(words) for words in map(fuzzing.drawn, range(14))}
    assert not [said for said in found.values() if said is not None and (not said or "\n" in said)]
    assert 2 < sum(said is None for said in found.values()) < 12  # both kinds are among them
    assert not list(cwd.iterdir())


@pytest.mark.slow
def test_two_thousand_configurations_are_taken_or_refused_in_a_line(cwd: Path) -> None:
    failures = []
    for seed in range(2000):
        try:
            said = checked(fuzzing.drawn(seed))
        except Exception as error:  # collected, to see them all
            failures.append(f"{seed}: {type(error).__name__}: {error}: {shlex.join(fuzzing.drawn(seed))}")
        else:
            if said is not None and (not said or "\n" in said):
                failures.append(f"{seed}: {said!r}")
    assert not failures, "\n".join(failures)
    assert not list(cwd.iterdir())


@pytest.mark.slow
def test_what_is_taken_runs(tmp_path: Path) -> None:
    """Two hundred as `fl-sim run`, each a process; exit status, stderr and what is left behind are looked at."""
    command = [sys.executable, str(Path(fuzzing.__file__)), "0", "200", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    *lines, ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [line for line in lines if line["complaint"]]
    assert ends["ran"] > 20
    assert ends["refused"] > 50


@pytest.mark.slow
def test_fifty_commands_in_processes_of_their_own(tmp_path: Path) -> None:
    """The command itself, nothing imported before: exit status 2, one line and an empty folder; or a run."""
    seen = set()
    for seed in range(5000, 5050):
        folder = tmp_path / str(seed)
        folder.mkdir()
        command = [sys.executable, "-m", "fl_sim.cli", "run", *fuzzing.drawn(seed)]
        status: int | None = None
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        except subprocess.TimeoutExpired as error:
            said = (error.stderr or b"").decode()
        else:
            status, said = done.returncode, done.stderr
        assert fuzzing.wrong_with(status, said, folder) is None, (shlex.join(command), status, said)
        seen.add(status)
    assert {OK, USAGE} <= seen


# What was left behind, and spoiled ------------------------------------------------------------------------------------

REMEMBERING = ("client=fed_nad", "client.epochs=1", *tiny.ERASING)


class Stopped(BaseException):
    """Raised where a resumed run would go on: it was taken for sound."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run(tmp_path_factory.mktemp("finished") / "run", *REMEMBERING)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.interrupted(tmp_path_factory.mktemp("broken") / "run", "_save", 3, *REMEMBERING)


def read(command: str, folder: Path, sound: Path, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """The exit status of a command that reads the folder; None where a run would have gone on."""
    with monkeypatch.context() as patch:
        patch.setattr(Federation, "_round", lambda *_: (_ for _ in ()).throw(Stopped))
        patch.setattr(execution, "draw_partitions", lambda *_: None)
        patch.setattr("fl_sim.summary.draw", lambda *_: None)
        words = {
            "report": ["report", str(folder), str(sound), "-o", str(folder.parent / "report.md")],
            "compare": ["compare", str(folder), str(sound)],
            "resume": ["resume", str(folder)],
            "replay": ["replay", str(folder)],
            "init": ["run", *tiny.TINY, f"init={folder / 'model.pt'}"],
        }
        try:
            return main(words[command])
        except Stopped:
            return None


def judge(command: str, number: int, sound: Path, spoilt: Path, patch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Spoil a copy of a folder and give it to a command."""
    rng = random.Random(f"{command} {number}")
    folder = spoilt.parent / f"{command}-{number}"
    shutil.copytree(spoilt, folder)
    what = damaging.damaged(folder, rng)
    before = tiny.snapshot(folder)
    status = read(command, folder, sound, patch)
    said = capsys.readouterr().err
    assert "Traceback" not in said, what
    if status == USAGE:
        assert said.startswith("fl-sim: "), (what, said)
        assert all(line.startswith("fl-sim: ") for line in said.splitlines()), (what, said)
        assert tiny.snapshot(folder) == before, what
    else:
        assert status in (OK, None), what
    shutil.rmtree(folder)


COMMANDS = ("report", "compare", "resume", "replay", "init")


@pytest.mark.parametrize("command", COMMANDS)
def test_spoilt_run_folders_are_read_or_refused_in_a_line(
    command: str, cwd: Path, finished: Path, broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Six of each; a folder that is refused is left as it is, to the byte."""
    for number in range(6):
        judge(command, number, finished, _copy(cwd, finished, broken, command), monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_three_hundred_spoilt_run_folders(
    command: str, cwd: Path, finished: Path, broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    failures = []
    for number in range(300):
        try:
            judge(command, number, finished, _copy(cwd, finished, broken, command), monkeypatch, capsys)
        except Exception as error:  # collected, to see them all
            failures.append(f"{command} {number}: {type(error).__name__}: {str(error)[:300]}")
    assert not failures, "\n".join(failures)


def _copy(cwd: Path, finished: Path, broken: Path, command: str) -> Path:
    """The folder to spoil, beside which there is room for copies."""
    original, mine = broken if command == "resume" else finished, cwd / "original"
    if not mine.exists():
        shutil.copytree(original, mine)
    return mine
