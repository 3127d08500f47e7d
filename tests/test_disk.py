"""A disk that is full, or that may not be written on: one line, nothing overwritten, and the run goes on later."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny

from fl_sim import execution
from fl_sim.cli import FAILED, OK, USAGE, main
from fl_sim.rounds import Federation

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than such a run, and is tested elsewhere."""
    monkeypatch.setattr("fl_sim.summary.draw", lambda *_: None)
    monkeypatch.setattr(execution, "draw_partitions", lambda *_: None)


@contextmanager
def files_of(most: int) -> Iterator[None]:
    """No file may become longer than so many bytes: what a full disk does to whoever writes, and as an OSError too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def complaint(capsys: Capture) -> str:
    """The one line on stderr."""
    said = capsys.readouterr().err
    assert said.startswith("fl-sim: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("most", "reached"),
    [(300, "no round at all"), (1000, "a few lines of the record"), (4000, "the record, and no checkpoint")],
)
def test_a_run_that_can_write_no_more_ends_in_a_line_and_goes_on_later(
    most: int, reached: str, tmp_path: Path, capsys: Capture
) -> None:
    """Wherever the writing fails; the checkpoint of the round before it, if there is one, stays whole."""
    whole = tiny.run(tmp_path / "whole", "rounds=3")
    folder = tiny.interrupted(tmp_path / "run", "_save", 2, "rounds=3")
    checkpoint = (folder / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    with files_of(most):
        assert main(["resume", str(folder)]) == FAILED
    assert "File too large" in complaint(capsys), reached
    assert not (folder / "done").exists()
    assert (folder / "checkpoint.pt").read_bytes() == checkpoint
    assert not list(folder.rglob("*.part"))
    assert main(["resume", str(folder)]) == OK
    assert tiny.numbers(folder) == tiny.numbers(whole)


def test_where_nothing_may_be_written_no_run_begins(cwd: Path, capsys: Capture) -> None:
    assert main(["run", *tiny.TINY, "output=/proc/runs"]) == USAGE
    assert complaint(capsys).startswith("fl-sim: output=/proc/runs/")
    assert not list(cwd.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte in memory; only root may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
        pytest.skip("needs root, to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_and_one_that_is_read_only(small_disk: Path, tmp_path: Path, capsys: Capture) -> None:
    """A real one: filled up by something else in round 3 of 6, read-only for a while, then with room again."""
    whole = tiny.run(tmp_path / "whole", "rounds=6")
    original = Federation._round

    def filling(self: Federation, t: int) -> None:
        if t == 3:
            with pytest.raises(OSError, match="No space"), (small_disk / "other").open("wb") as file:
                file.write(bytes(2 << 20))
        original(self, t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "_round", filling)
        assert main(["run", *tiny.TINY, "rounds=6", f"output={small_disk}"]) == FAILED
    assert "No space left on device" in complaint(capsys)
    [folder] = [path.parent for path in small_disk.glob("*/*/config.yaml")]
    assert not list(folder.rglob("*.part"))
    before = tiny.snapshot(folder)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert main(["resume", str(folder)]) == FAILED
    assert "Read-only file system" in complaint(capsys)
    assert tiny.snapshot(folder) == before
    subprocess.run(["mount", "-o", "remount,rw,size=8m", small_disk], check=True)
    (small_disk / "other").unlink()
    assert main(["resume", str(folder)]) == OK
    assert tiny.numbers(folder) == tiny.numbers(whole)
    assert execution.resume(folder)["rounds"] == 6
