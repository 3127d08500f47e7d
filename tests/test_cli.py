"""The command line: a contract for other people's scripts. Most of it runs in this process; a few commands for real."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from fl_sim import __version__, cli, execution
from fl_sim.cli import FAILED, INTERRUPTED, OK, USAGE, main
from fl_sim.composing import GROUPS
from fl_sim.rounds import Federation

ROOT = Path(__file__).parent.parent
Capture = pytest.CaptureFixture[str]


def run_folder(output: Path) -> Path:
    """The one finished run below a folder."""
    [done] = output.rglob("done")
    return done.parent


# Words without a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["-h"], ["help"], ["run", "--help"], ["resume", "-h"], ["list", "-h"]]
)
def test_help_is_short_and_has_three_examples(words: list[str], capsys: Capture) -> None:
    """`fl-sim` alone must tell a newcomer what to type, on one screen."""
    assert main(words) == OK
    shown = capsys.readouterr()
    assert shown.err == ""
    assert len(shown.out.splitlines()) <= 24
    examples = shown.out.partition("Examples")[2].splitlines()
    assert sum(line.startswith("  fl-sim run") for line in examples) == 3


def test_the_examples_of_the_help_are_valid(capsys: Capture, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever copies one must not meet an error: each is composed and checked, but not run."""
    for begin in ("start", "take_up"):
        monkeypatch.setattr(execution, begin, lambda *a: (_ for _ in ()).throw(Stopped))
    lines = cli.HELP.partition("Examples")[2].splitlines()
    examples = [line.split()[1:] for line in lines if line.startswith("  fl-sim run")]
    assert len(examples) == 3
    for words in examples:
        if "-m" in words:
            assert main(words) == FAILED  # nine checked jobs, each stopped where it would have begun
            assert capsys.readouterr().err.count("Stopped") >= 9
        else:
            with pytest.raises(Stopped):
                main(words)


class Stopped(Exception):
    """Raised where a run would begin."""


@pytest.mark.parametrize("words", [["--version"], ["-V"]])
def test_the_version(words: list[str], capsys: Capture) -> None:
    """One line that a script can parse."""
    assert main(words) == OK
    assert capsys.readouterr().out == f"fl-sim {__version__}\n"


WRONG = [
    ["fly"],
    ["--verbose"],
    ["run", "--nope"],
    ["run", "-x"],
    ["run", "--config-dir", "/nope"],
    ["run", "--config-dir"],
    ["run", "--config-dir="],
    ["run", "nonsense=1"],
    ["run", "-m", "seed=[1"],
    ["run", "--cfg", "rounds=ten"],
    ["resume"],
    ["resume", "a", "b"],
    ["list", "fruits"],
    ["list", "eraser", "trigger"],
    ["list", "--nope"],
]


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_a_wrong_command_is_one_line_and_status_2(words: list[str], cwd: Path, capsys: Capture) -> None:
    """No traceback, nothing on stdout, nothing left behind."""
    assert main(words) == USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("fl-sim: ")
    assert shown.err.count("\n") == 1
    assert list(cwd.iterdir()) == []


ISSUE = (
    "rounds=-1",
    "rounds=ten",
    "clients=0",
    "clients_per_round=999",
    "nonsense=1",
    "eraser=nda",
    "eraser=[nad,fine_tune]",
    "threat.fraction=1.5",
    "data.clean_fraction=0",
    "device=cuda:9",
    "trigger.size=500",
    "seed=abc",
)


@pytest.mark.parametrize("override", ISSUE)
def test_a_bad_setting_leaves_three_lines_at_most_and_no_folder(override: str, cwd: Path, capsys: Capture) -> None:
    """Settings that can't be used: status 2, the key named, no traceback, no run folder."""
    assert main(["run", override]) == USAGE
    shown = capsys.readouterr()
    assert override.split("=")[0] in shown.err
    assert 1 <= len(shown.err.splitlines()) <= 3
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert list(cwd.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(cwd: Path, capsys: Capture) -> None:
    """`output` below a file: one line, status 2."""
    (cwd / "file").write_text("")
    assert main(["run", *tiny.TINY, "output=file/runs"]) == 2
    assert capsys.readouterr().err.startswith("fl-sim: output=file/runs")


def test_the_composed_configuration_is_printed(capsys: Capture, cwd: Path) -> None:
    """`--cfg` prints YAML of the checked configuration and starts nothing."""
    assert main(["run", "--cfg", "rounds=7", "seeds.train=3"]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert {"rounds: 7", "  train: 3", "  data: 0", "  eraser: nad"} <= set(lines)
    assert list(cwd.iterdir()) == []


def test_list_shows_every_group_with_its_choices(capsys: Capture) -> None:
    """A heading a group, a line a choice, with its sentence, paper and fidelity."""
    assert main(["list"]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(GROUPS)
    assert sum(line.startswith("  ") for line in lines) >= 40
    [nad] = [line for line in lines if line.startswith("  nad ")]
    assert nad.endswith("[Li et al., ICLR 2021; fidelity: paper]")


def test_list_shows_one_group(capsys: Capture) -> None:
    """`fl-sim list eraser` is that part of the whole list."""
    main(["list"])
    whole = capsys.readouterr().out
    assert main(["list", "eraser"]) == OK
    part = capsys.readouterr().out
    assert part in whole
    assert part.startswith("eraser\n")
    assert {"none", "fine_tune", "nad", "nad_official", "reinit_head"} <= {
        line.split()[0] for line in part.splitlines()
    }


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_is_told_line_by_line_and_ends_with_table_and_picture(cwd: Path, capsys: Capture) -> None:
    """What stands on stdout when it is no terminal, in order, and where the run is put."""
    words = [*tiny.TINY, *tiny.ERASING, "name=try-1"]
    assert main(["run", *words]) == OK
    shown = capsys.readouterr()
    folder = run_folder(cwd / "runs").relative_to(cwd)
    assert re.fullmatch(r"runs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d_try-1_[a-z]{4}", str(folder))
    lines = shown.out.splitlines()
    assert lines[1] == str(folder)
    assert [int(found) for found in re.findall(r"round (\d)/3  ACC 0\.\d{3}  ASR \d\.\d{3} ", shown.out)] == [1, 2, 3]
    assert len([line for line in lines if "erasing  fine_tune  ACC" in line]) == 1
    assert any("at the end" in line for line in lines)
    assert lines[-1] == f"curves: {folder}/curves.png"
    assert "\x1b" not in shown.out
    assert shown.err == ""
    meta = json.loads((cwd / folder / "meta.json").read_text())
    assert meta["argv"] == ["fl-sim", "run", *words]
    # Resuming a finished run says so and shows the same table.
    assert main(["resume", str(folder)]) == OK
    again = capsys.readouterr().out.splitlines()
    assert again[0] == f"{folder} is finished already"
    assert again[1:] == lines[-len(again) + 1 :]


@pytest.mark.parametrize("output", ["output=5", "output=deep/er", "name=5"])
def test_names_and_folders_may_look_like_numbers(output: str, cwd: Path) -> None:
    """YAML reads 5 as a number; a folder and a name are text all the same."""
    assert main(["run", *tiny.TINY, "rounds=1", output]) == OK
    assert str(run_folder(cwd).relative_to(cwd)).startswith(
        output.removeprefix("output=") if "output" in output else "runs"
    )


def test_an_interrupted_run_says_how_to_go_on(cwd: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C: status 130, the exact command to continue, and that command works."""
    original = Federation._round

    def stopping(self: Federation, t: int) -> None:
        if t == 2:
            raise KeyboardInterrupt
        original(self, t)

    with monkeypatch.context() as patch:
        patch.setattr(Federation, "_round", stopping)
        assert main(["run", *tiny.TINY]) == INTERRUPTED
    error = capsys.readouterr().err
    [command] = re.findall(r"Go on with: fl-sim (resume \S+)", error)
    assert "Traceback" not in error
    assert list(cwd.rglob("done")) == []
    assert main(command.split()) == OK
    assert [event["round"] for event in tiny.events(run_folder(cwd), "round")] == [1, 2, 3]


def test_resuming_what_is_no_run_fails_in_one_line(cwd: Path, capsys: Capture) -> None:
    """Status 2: a folder is as much a wish as a setting."""
    (cwd / "empty").mkdir()
    for folder, complaint in (("nope", "no such folder"), ("empty", "not a run folder")):
        assert main(["resume", folder]) == USAGE
        shown = capsys.readouterr()
        assert complaint in shown.err
        assert shown.err.count("\n") == 1
    assert list((cwd / "empty").iterdir()) == []


# Sweeps ---------------------------------------------------------------------------------------------------------------

SWEEP = ["run", "-m", *tiny.TINY, "rounds=2", "name=compare", "trigger.size=2,500,3", "seed=0,1"]


def test_a_bad_job_does_not_stop_the_others_and_finished_ones_are_kept(cwd: Path, capsys: Capture) -> None:
    """Two of six jobs ask for a trigger of 500 pixels: four finish, the status is 1, and the table says which is which.

    The same command again runs none of the four a second time.
    """
    assert main(SWEEP) == FAILED
    shown = capsys.readouterr()
    assert shown.err.count("fl-sim: trigger.size=500") == 2
    assert "Traceback" not in shown.err
    assert [line for line in shown.out.splitlines() if line.startswith("[")][-1].startswith("[6/6] ")
    assert len(re.findall(r"│ finished", shown.out)) == 4
    assert len(re.findall(r"│ failed", shown.out)) == 2
    folders = sorted(path.parent for path in cwd.rglob("done"))
    assert len(folders) == len(list((cwd / "runs").rglob("config.yaml"))) == 4
    assert {path.parent for path in folders} == {cwd / "runs" / "sweeps" / "compare"}
    assert all(re.fullmatch(r"[0-9a-f]{12}", path.name) for path in folders)
    before = tiny.snapshot(cwd)
    assert main(SWEEP) == FAILED
    assert len(re.findall(r"│ found finished", capsys.readouterr().out)) == 4
    assert tiny.snapshot(cwd) == before


def test_a_sweep_without_bad_jobs_succeeds(cwd: Path, capsys: Capture) -> None:
    """Status 0; and a larger sweep of the same name only adds what is missing."""
    words = ["run", "-m", *tiny.TINY, "rounds=1", "name=more"]
    assert main([*words, "seed=0,1"]) == OK
    assert main([*words, "seed=0,1,2"]) == OK
    out = capsys.readouterr().out
    assert (out.count("│ found finished"), len(list(cwd.rglob("done")))) == (2, 3)


@pytest.mark.slow
@pytest.mark.slow
def test_runs_side_by_side_are_the_runs_in_turn(cwd: Path, capsys: Capture) -> None:
    """`--jobs 2` finds the same folders with the same numbers; a bad job is told, and does not stop the others."""
    words = ["run", "-m", *tiny.TINY, "rounds=2", "seed=0,1"]
    assert main([*words, "name=turn"]) == OK
    assert main([*words, "trigger.size=3,500", "name=beside", "--jobs", "2"]) == FAILED
    assert main([*words, "trigger.size=3", "name=turn"]) == OK
    shown = capsys.readouterr()
    assert shown.err.count("fl-sim: trigger.size=500") == 2
    assert "4 runs, 2 at a time" in shown.out
    folders = sorted((cwd / "runs/sweeps/beside").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert tiny.numbers(folder) == tiny.numbers(cwd / "runs/sweeps/turn" / folder.name)


@pytest.mark.parametrize("words", [["--jobs", "0"], ["--jobs"], ["--jobs=two"], ["-j", "-1"]])
def test_a_strange_number_of_jobs_is_refused(words: list[str], capsys: Capture) -> None:
    """Before any run begins; and without -m there is nothing to run side by side."""
    assert main(["run", "-m", "seed=0,1", *words]) == USAGE
    assert capsys.readouterr().err.startswith("fl-sim: --jobs")
    assert main(["run", "--jobs", "2"]) == USAGE
    assert "add -m" in capsys.readouterr().err


def test_an_unforeseen_fault_in_one_job_does_not_stop_the_others(
    cwd: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug shows its traceback, once, and the next job runs; its unfinished folder is taken up by the next attempt."""
    original = Federation._round

    def breaking(self: Federation, t: int) -> None:
        if self._settings.seed == 0 and t == 2:
            raise ZeroDivisionError("a bug")
        original(self, t)

    words = ["run", "-m", *tiny.TINY, "name=faulty", "seed=0,1"]
    with monkeypatch.context() as patch:
        patch.setattr(Federation, "_round", breaking)
        assert main(words) == FAILED
    shown = capsys.readouterr()
    assert shown.err.count("Traceback") == 1
    assert "ZeroDivisionError: a bug" in shown.err
    assert len(list(cwd.rglob("done"))) == 1
    assert main(words) == OK
    out = capsys.readouterr().out
    assert ("resumed" in out, "found finished" in out) == (True, True)
    assert len(list(cwd.rglob("done"))) == 2


# For real: other processes --------------------------------------------------------------------------------------------


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fl_sim.cli", *words]


def executed(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    return subprocess.run(command(*words), cwd=cwd, capture_output=True, text=True, timeout=120, env=environment)


def test_a_bad_setting_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The exit status that a shell sees, with nothing on stdout: no warning of a library, no traceback, no folder."""
    done = executed(tmp_path, "run", "rounds=ten")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fl-sim: rounds=ten: must be a whole number\n"
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_is_this_program() -> None:
    """The console script beside the interpreter, if the project is installed there."""
    script = Path(sys.executable).parent / "fl-sim"
    if not script.exists():
        pytest.skip("not installed")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"fl-sim {__version__}\n")


KILLED = (
    "data=digits",
    "model.width=4",
    "rounds=12",
    "eraser=fine_tune",
    "eraser.epochs=2",
    "eraser.min_steps=10",
    "erasing.rounds=3",
    "server_optimizer=momentum",
    "server_optimizer.lr=0.5",
    "engine.workers=2",
)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until it holds; fails if the process ends before, or after two minutes."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_kill_9_and_resume_is_as_if_never_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process, killed in round 7 of 12 without a chance to tidy up, then continued here.

    Its metrics and its model equal those of a run in this process that nobody disturbed.
    """
    environment = os.environ | {"MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("run", *KILLED, "name=killed"), cwd=tmp_path, stdout=subprocess.DEVNULL, env=environment
    )
    try:
        metrics: list[Path] = []

        def in_round_seven() -> bool:
            metrics[:] = metrics or [*tmp_path.glob("runs/*/*/metrics.jsonl")]
            return bool(metrics) and b'"event": "round", "round": 6,' in metrics[0].read_bytes()

        wait_for(in_round_seven, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    folder = metrics[0].parent
    assert not (folder / "done").exists()
    survived = tiny.events(folder, "round")[-1]["round"]
    assert 6 <= survived < 12
    monkeypatch.chdir(tmp_path)
    assert main(["resume", str(folder)]) == OK
    assert main(["run", *KILLED, "name=whole", "output=undisturbed"]) == OK
    whole = run_folder(tmp_path / "undisturbed")
    assert tiny.numbers(folder) == tiny.numbers(whole)
    assert [event["round"] for event in tiny.events(folder, "round")] == list(range(1, 13))
    assert [event["round"] for event in tiny.events(folder, "erase")] == [3, 6, 9, 12]
    leftovers = [path.name for path in folder.iterdir() if path.name.endswith(".part")]
    assert leftovers == []


def test_a_terminated_run_ends_like_an_interrupted_one(tmp_path: Path) -> None:
    """SIGTERM, which is what a cluster sends: status 130, the command to go on, no traceback; plain lines till then."""
    process = subprocess.Popen(
        command("run", *KILLED, "rounds=1000"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "FORCE_COLOR": ""},
    )
    wait_for(lambda: any(b'"round": 2' in path.read_bytes() for path in tmp_path.rglob("metrics.jsonl")), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert b"fl-sim resume runs/" in err
    assert b"Traceback" not in err
    assert b"\x1b" not in out
    assert b"round 1/1000  ACC" in out


def test_an_empty_range_is_refused(capsys: Capture) -> None:
    """A sweep of no runs would otherwise end well, having done nothing."""
    assert main(["run", "-m", "seed=range(0,0)"]) == USAGE
    assert "gives no run" in capsys.readouterr().err
    assert main(["central", "--jobs", "2"]) == USAGE


@pytest.mark.parametrize("command", [["gallery"], ["list", "partition", "--plot"]])
@pytest.mark.parametrize("target", ["absent/page.png", "page.foo", "page"])
def test_a_picture_that_cannot_be_written_is_refused_before_it_is_drawn(
    command: list[str], target: str, cwd: Path, capsys: Capture
) -> None:
    """Both commands that draw: one line that names -o, status 2, and no folder made on the way."""
    assert main([*command, "-o", target]) == USAGE
    assert capsys.readouterr().err.startswith(f"fl-sim: -o={target}")
    assert list(cwd.iterdir()) == []


@pytest.mark.parametrize("command", ["report", "compare", "replay", "resume"])
def test_an_empty_word_is_not_the_current_folder(command: str, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell's unset variable gives it."""
    assert main([command, ""]) == USAGE
    assert capsys.readouterr().err == f"fl-sim: {command}: one of its words is empty\n"
    assert not list(cwd.iterdir())


# What the system refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["resume LONG", "replay LONG", "compare LONG b", "list --config-dir LONG"])
def test_a_path_too_long_is_one_line(words: str, cwd: Path, capsys: Capture) -> None:
    """No system takes such a name: status 2."""
    assert main(words.replace("LONG", "a" * 5000).split()) == USAGE
    shown = capsys.readouterr().err
    assert shown.endswith("is too long for a file's name\n")
    assert shown.count("\n") == 1
    assert len(shown) < 200


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has such a device")
@pytest.mark.parametrize("words", [["--version"], ["run", *tiny.TINY]])
def test_output_that_cannot_be_written_is_one_line_and_leaves_no_folder(
    words: list[str], cwd: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(words) == FAILED
    assert capsys.readouterr().err == "fl-sim: No space left on device\n"
    assert list(cwd.iterdir()) == []


def test_a_closed_output_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`>&-`: Python has no `sys.stdout` then."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["list", "erasing"]) == OK
    sys.stdout.close()


def test_a_working_directory_that_is_gone_is_one_line(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["run"]) == FAILED
    assert capsys.readouterr().err == "fl-sim: the working directory is not there any more\n"


def test_a_second_interrupt_does_not_disturb_the_end(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is often pressed twice, and by batch systems beside a SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    complain = cli._complain

    def stopped(_arguments: list[str]) -> int:
        raise KeyboardInterrupt

    def pressed(message: str, status: int) -> int:
        for number in before:
            signal.raise_signal(number)
        return complain(message, status)

    monkeypatch.setattr(cli, "_answer", stopped)
    monkeypatch.setattr(cli, "_complain", pressed)
    assert main([]) == INTERRUPTED
    assert capsys.readouterr().err == "fl-sim: interrupted\n"
    assert {number: signal.getsignal(number) for number in before} == before
