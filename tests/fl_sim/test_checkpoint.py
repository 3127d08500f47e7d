"""Files that are whole or not there."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import IO

import pytest
import torch

from fl_sim.checkpoint import Checkpoints, load_tensors, save_tensors, write_atomically
from fl_sim.errors import RunError


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: IO[bytes]) -> None:
        file.write(b"half of the n")
        raise error

    with pytest.raises(RunError if isinstance(error, OSError) else type(error)):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a longer old content")
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="can't write"):
        write_atomically(tmp_path / "none" / "file", lambda file: file.write(b""))


def test_tensors_and_plain_values_come_back(tmp_path: Path) -> None:
    content = {"vector": torch.rand(5), "count": 3, "names": ["a", "b"], "nested": {"x": torch.ones(2), "y": 0.5}}
    save_tensors(tmp_path / "file", content)
    back = load_tensors(tmp_path / "file")
    assert torch.equal(back["vector"], content["vector"])
    assert torch.equal(back["nested"]["x"], torch.ones(2))
    assert (back["count"], back["names"], back["nested"]["y"]) == (3, ["a", "b"], 0.5)


@pytest.mark.parametrize("garbage", [b"", b"garbage", b"PK\x03\x04 half a zip", b"\x80\x02}q\x00."])
def test_garbage_is_a_run_error(tmp_path: Path, garbage: bytes) -> None:
    """The last one is a pickled empty dict, without torch's envelope: either way no other exception leaves."""
    path = tmp_path / "file"
    path.write_bytes(garbage)
    with pytest.raises(RunError, match="can't read"):
        load_tensors(path)


def test_a_truncated_or_missing_file_is_a_run_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_tensors(path, {"vector": torch.rand(1000)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="damaged"):
        load_tensors(path)
    with pytest.raises(RunError, match="FileNotFoundError"):
        load_tensors(tmp_path / "none")


def test_a_file_of_something_else_is_a_run_error(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "file")
    with pytest.raises(RunError, match="not fl-sim's"):
        load_tensors(tmp_path / "file")


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "touched",)

    torch.save({"x": Evil()}, tmp_path / "file")
    with pytest.raises(RunError):
        load_tensors(tmp_path / "file")
    assert not (tmp_path / "touched").exists()


def test_nothing_before_the_first_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).load() is None


def test_clients_files_carry_the_round_they_were_written_in(tmp_path: Path) -> None:
    """Client 3 remembers in rounds 1 and 4, client 7 in round 2: only the last of each is kept."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"vector": torch.ones(2)}, {3: {"x": 1}})
    checkpoints.save(2, {"vector": torch.ones(2)}, {7: {"x": torch.full((2,), 5.0)}})
    checkpoints.save(4, {"vector": torch.full((2,), 4.0)}, {3: {"x": 2}})
    assert sorted(path.name for path in (tmp_path / "clients").iterdir()) == ["3_4.pt", "7_2.pt"]
    found = Checkpoints(tmp_path).load()
    assert found is not None
    content, clients = found
    assert content["round"] == 4
    assert content["vector"].tolist() == [4.0, 4.0]
    assert clients[3] == {"x": 2}
    assert torch.equal(clients[7]["x"], torch.full((2,), 5.0))  # type: ignore[arg-type]


def test_no_client_folder_where_no_client_remembers(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_crash_before_the_commit_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    """Round 2 dies after its client file and before its checkpoint: round 1 with its own client file still counts,
    also for the run that goes on from there."""
    Checkpoints(tmp_path).save(1, {"vector": torch.ones(2)}, {3: {"x": 1}})
    dying = Checkpoints(tmp_path)
    dying.load()
    with pytest.raises(Exception, match="pickle"):
        dying.save(2, {"vector": lambda: None}, {3: {"x": 2}})
    resumed = Checkpoints(tmp_path)
    found = resumed.load()
    assert found is not None
    assert found[0]["round"] == 1
    assert found[1] == {3: {"x": 1}}
    resumed.save(2, {"vector": torch.ones(2)}, {3: {"x": 20}})
    again = Checkpoints(tmp_path).load()
    assert again is not None
    assert again[1] == {3: {"x": 20}}
    assert [path.name for path in (tmp_path / "clients").iterdir()] == ["3_2.pt"]


def test_another_format_is_a_run_error(tmp_path: Path) -> None:
    save_tensors(tmp_path / "checkpoint.pt", {"format": 99, "clients": {}})
    with pytest.raises(RunError, match="format 99"):
        Checkpoints(tmp_path).load()


def test_a_lost_client_file_is_a_run_error(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, {}, {3: {"x": 1}})
    (tmp_path / "clients" / "3_1.pt").unlink()
    with pytest.raises(RunError, match=r"3_1\.pt"):
        Checkpoints(tmp_path).load()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_writing_waits_until_the_file_is_whole(tmp_path: Path, number: signal.Signals) -> None:
    """It arrives in the middle of the write; the file is complete, the interrupt is still raised, as itself."""
    arrived = []

    def write(file: IO[bytes]) -> None:
        file.write(b"first ")
        signal.raise_signal(number)
        file.write(b"second")

    def stop(*_: object) -> None:
        arrived.append(number)
        raise KeyboardInterrupt

    previous = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "file", write)
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, previous)
    assert arrived == [number]
    assert (tmp_path / "file").read_bytes() == b"first second"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
