"""Packing: how many runs at a time, where each, when one waits for memory. No GPU is needed: facts are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fl_sim.packing import ASSUMED, GIB, Guard, Holder, Slot, ThisMachine, forget_peak, how_many, slots

JOBS = [[f"seed={seed}"] for seed in range(100)]


@dataclass(frozen=True)
class Told:
    """A machine as the test says."""

    cores: int = 16
    gpus: Sequence[str] = ()
    memory: int | None = 64 * GIB
    gpu_memory: Mapping[str, int] = field(default_factory=dict)

    def free(self) -> int | None:
        return self.memory

    def gpu_free(self, gpu: str) -> int | None:
        return self.gpu_memory.get(gpu)

    def held(self, process: int) -> tuple[int, int]:
        return 0, 0


def test_cores_are_shared_and_gpus_are_dealt_round() -> None:
    """Six runs on 16 cores and four GPUs: two cores each, and the fifth and sixth share the first two GPUs."""
    found = slots(6, Told(gpus="abcd"), JOBS)
    assert [slot.cores for slot in found] == [2] * 6
    assert [slot.gpu for slot in found] == ["a", "b", "c", "d", "a", "b"]
    assert [slot.number for slot in found] == list(range(6))
    assert {slot.cores for slot in slots(40, Told(), JOBS)} == {1}


@pytest.mark.parametrize(
    ("words", "dealt"),
    [
        ([], True),
        (["device=cuda"], True),
        (["device=auto"], True),
        (["device=cpu"], False),
        (["device=cuda:1"], False),
    ],
)
def test_gpus_are_dealt_only_to_runs_that_leave_the_choice(words: list[str], dealt: bool) -> None:
    """Who names cuda:1 must find it by that number; who computes on the CPU needs none."""
    [slot] = slots(1, Told(gpus="ab"), [["seed=1", *words]])
    assert slot.gpu == ("a" if dealt else None)
    both = slots(2, Told(gpus="ab"), [["device=cpu"], ["device=auto"]])
    assert [slot.gpu for slot in both] == ["a", "b"]


def test_as_many_as_asked_but_no_more_than_there_are() -> None:
    """Two runs with --jobs 8 get half of the cores each, not an eighth."""
    assert how_many(8, Told(), JOBS) == 8
    assert how_many(8, Told(), JOBS[:2]) == 2
    assert how_many(8, Told(memory=0), JOBS) == 8  # the guard makes them wait; it was asked for


def test_auto_goes_by_cores_memory_and_gpus() -> None:
    """One for each core; one for each 4 GiB of memory; on GPUs as many as fit by the same measure, at most 4."""
    assert how_many("auto", Told(memory=None), JOBS) == 16
    assert how_many("auto", Told(memory=3 * ASSUMED + 1), JOBS) == 3
    assert how_many("auto", Told(memory=1), JOBS) == 1
    assert how_many("auto", Told(), JOBS[:5]) == 5
    gpus = Told(gpus="ab", gpu_memory={"a": 80 * GIB, "b": 80 * GIB})
    assert how_many("auto", gpus, JOBS) == 8
    assert how_many("auto", Told(gpus="ab", gpu_memory={"a": 80 * GIB, "b": 9 * GIB}), JOBS) == 4
    assert how_many("auto", Told(gpus="ab", gpu_memory={"a": 80 * GIB, "b": GIB}), JOBS) == 2
    assert how_many("auto", gpus, [["device=cpu", *job] for job in JOBS]) == 16


def holder(held: float = 0.0, gpu: str | None = None, settled: bool = True) -> Holder:
    return Holder(gpu, int(held * GIB), settled)


def test_a_run_waits_for_memory_but_the_first_never() -> None:
    """Measured 10 GiB, so 11 with the spare tenth: with 12 free a second one fits if the first one has all of its own,
    and not while the first may still grow by 6 of the 12."""
    guard = Guard(Told(memory=12 * GIB))
    guard.note(10 * GIB)
    slot = Slot(1, 1)
    assert guard.complaint(slot, [holder(11)]) is None
    assert guard.complaint(slot, [holder(5)]) == "a run needs about 11.0 GiB of memory, 6.0 GiB is left"
    nothing = Guard(Told(memory=0))
    nothing.note(10 * GIB)
    assert nothing.complaint(slot, []) is None
    assert nothing.complaint(slot, [holder(11)]) is not None
    assert Guard(Told(memory=None)).complaint(slot, [holder(11)]) is None


def test_before_anything_is_measured_a_run_is_supposed_to_need_4_gib() -> None:
    """12 GiB free, one just begun that holds 1: 3 are still its own, 9 are left; with two more begun, 1 is."""
    guard = Guard(Told(memory=12 * GIB))
    assert guard.complaint(Slot(1, 1), [holder(1)]) is None
    assert guard.complaint(Slot(3, 1), [holder(1), holder(0), holder(0)]) is not None
    guard.note(GIB // 2)  # then it needs less than was supposed
    assert guard.complaint(Slot(3, 1), [holder(1), holder(0), holder(0)]) is None


def test_a_gpu_is_guarded_by_itself() -> None:
    """Another GPU's runs don't count, nor does what a run that has got through a round holds: it is no longer free."""
    guard = Guard(Told(gpu_memory={"a": 12 * GIB, "b": 3 * GIB}))
    guard.note(GIB, 5 * GIB)
    slot = Slot(2, 1, "a")
    assert guard.complaint(slot, [holder(1, "a")]) is None
    assert guard.complaint(slot, [holder(1, "a", settled=False), holder(1, "b", settled=False)]) is None
    complaint = guard.complaint(slot, [holder(1, "a", settled=False)] * 2)
    assert complaint == "a run needs about 5.5 GiB of GPU a, 1.0 GiB is left"
    assert guard.complaint(Slot(3, 1, "b"), [holder(1, "a")]) is None  # the first on its GPU
    assert guard.complaint(Slot(3, 1, "b"), [holder(1, "b")]) is not None


def proc(root: Path, available: int, *groups: tuple[str, str, int, int]) -> ThisMachine:
    """A machine whose system files say so: KiB available, and (path, limit, current, inactive files) of its groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal:       99 kB\nMemAvailable:   {available} kB\n")
    (root / "proc/self/cgroup").write_text("1:name=systemd:/x\n0::/jobs/one\n")
    for path, limit, current, cache in groups:
        folder = root / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    return ThisMachine(root)


def test_free_memory_is_the_least_of_machine_and_containers(tmp_path: Path) -> None:
    """The machine has 100 MiB; the outer group's limit leaves 50 MB, and file caches can be had back; max is none."""
    machine = proc(tmp_path, 102400, ("jobs/one", "max", 9, 0), ("jobs", "80000000", 40000000, 10000000))
    assert machine.free() == 50_000_000
    assert proc(tmp_path / "b", 10).free() == 10240
    assert ThisMachine(tmp_path / "nothing").free() is None


def test_this_process_holds_something_and_its_peak_can_be_forgotten() -> None:
    """256 MiB more for a moment show in the peak; after forgetting it is no longer there."""
    machine = ThisMachine()
    if machine.free() is None:
        pytest.skip("no /proc")
    import os

    held, _ = machine.held(os.getpid())
    block = bytearray(256 * 2**20)
    block[:: 2**12] = b"\1" * len(block[:: 2**12])
    with_block = machine.held(os.getpid())[1]
    del block
    assert with_block >= held + 250 * 2**20
    forget_peak()
    assert machine.held(os.getpid())[1] <= with_block - 200 * 2**20
    assert machine.cores >= 1
    assert machine.gpu_free("no such GPU") is None
    assert machine.held(2**30) == (0, 0)


def test_gpus_are_named_as_the_environment_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """`CUDA_VISIBLE_DEVICES=2,3` leaves two, which are called 2 and 3 in what is passed on."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert ThisMachine().gpus == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3")
    assert ThisMachine().gpus == ["2", "3"]
