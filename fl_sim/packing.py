"""Packing: how many runs at a time, on which cores and GPU each, and whether one more fits into memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

GIB = 2**30
ASSUMED = 4 * GIB
"""What a run is supposed to need, of memory or of a GPU's, as long as none of the sweep has been measured."""
SPARE = 1.1
"""A run is given a tenth more than the most that any has needed."""
CUDA_CONTEXT = 600 * 2**20
"""What a process takes of a GPU's memory besides its tensors, roughly."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


class Machine(Protocol):
    """The facts that packing goes by."""

    @property
    def cores(self) -> int: ...

    @property
    def gpus(self) -> Sequence[str]:
        """The GPUs' names as `CUDA_VISIBLE_DEVICES` takes them."""
        ...

    def free(self) -> int | None:
        """Bytes of memory that could be had; None if there is no telling."""
        ...

    def gpu_free(self, gpu: str) -> int | None: ...

    def held(self, process: int) -> tuple[int, int]:
        """Bytes that a process holds, and the most that it has held since its run began; 0 if there is no telling."""
        ...


class ThisMachine:
    """The machine that this process runs on, within what its container and `CUDA_VISIBLE_DEVICES` leave it."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    @property
    def cores(self) -> int:
        from fl_sim.engines.inprocess import available_cores

        return available_cores()

    @property
    def gpus(self) -> Sequence[str]:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
        return named[:count] if named else [str(index) for index in range(count)]

    def free(self) -> int | None:
        left = [self._available(), *self._left_in_groups()]
        return min((each for each in left if each is not None), default=None)

    def gpu_free(self, gpu: str) -> int | None:
        query = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
            return int(said.split()[0]) * 2**20
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return None

    def held(self, process: int) -> tuple[int, int]:
        status = _table(self._root / "proc" / str(process) / "status")
        return status.get("VmRSS", 0) * 1024, status.get("VmHWM", 0) * 1024

    def _available(self) -> int | None:
        kib = _table(self._root / "proc/meminfo").get("MemAvailable")
        return None if kib is None else kib * 1024

    def _left_in_groups(self) -> Iterable[int | None]:
        """What is left of the limits of the control groups (version 2) that this process is in, as in a container."""
        groups = self._root / "sys/fs/cgroup"
        for line in _lines(self._root / "proc/self/cgroup"):
            if line.startswith("0::"):
                inner = groups / line.removeprefix("0::").strip("/")
                for folder in (inner, *inner.parents):
                    if folder.is_relative_to(groups):
                        yield _left(folder)


def _left(group: Path) -> int | None:
    """A control group's limit less what it holds; file caches, which are given up on demand, don't count as held."""
    try:
        limit, current = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit == "max":
            return None
        return int(limit) - int(current) + _table(group / "memory.stat").get("inactive_file", 0)
    except (OSError, ValueError):
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _table(path: Path) -> dict[str, int]:
    """The whole numbers of a file of names and values."""
    rows = (line.replace(":", " ").split() for line in _lines(path))
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def forget_peak() -> None:
    """Begin anew to note the most memory that this process holds; where the system can't, the note goes on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


@dataclass(frozen=True)
class Slot:
    """A place for one run at a time: its share of the cores, and its GPU where they are dealt out."""

    number: int
    cores: int
    gpu: str | None = None


def slots(count: int, machine: Machine, jobs: Sequence[Sequence[str]]) -> list[Slot]:
    """`count` places with an equal share of the cores each; the GPUs are dealt round."""
    gpus = _dealt(machine, jobs)
    share = max(1, machine.cores // count)
    return [Slot(number, share, gpus[number % len(gpus)] if gpus else None) for number in range(count)]


def how_many(asked: int | Literal["auto"], machine: Machine, jobs: Sequence[Sequence[str]]) -> int:
    """As many as asked, but no more than there are runs; auto: one for each core, or for each GPU as many as one holds.

    On GPUs a run leaves many gaps, but each also keeps a core busy: four runs for a GPU at most.
    """
    if asked != "auto":
        return max(1, min(asked, len(jobs)))
    free = machine.free()
    most = min(machine.cores, len(jobs), *([] if free is None else [free // ASSUMED]))
    gpus = _dealt(machine, jobs)
    if gpus:
        left = [machine.gpu_free(gpu) for gpu in gpus]
        each = min(4, *(4 if free is None else free // ASSUMED for free in left))
        most = min(most, max(1, each) * len(gpus))
    return max(1, most)


def _dealt(machine: Machine, jobs: Sequence[Sequence[str]]) -> Sequence[str]:
    """The GPUs to deal out: none if no run asks for one, or if runs say themselves which they want."""
    devices = {next((word.partition("=")[2] for word in job if word.startswith("device=")), "auto") for job in jobs}
    return machine.gpus if devices & {"auto", "cuda"} and not any(name.startswith("cuda:") for name in devices) else ()


@dataclass(frozen=True)
class Holder:
    """A run that is under way, as packing sees it: what it holds, and whether it has got through a round."""

    gpu: str | None
    held: int
    settled: bool


class Guard:
    """Whether one more run fits into memory, by the most that any run of the sweep has needed so far."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._peak = self._gpu_peak = 0

    def note(self, peak: int, gpu_peak: int = 0) -> None:
        """A run held that much at most; one that is under way, after its first round, so far."""
        self._peak, self._gpu_peak = max(self._peak, peak), max(self._gpu_peak, gpu_peak)

    def complaint(self, slot: Slot, running: Sequence[Holder]) -> str | None:
        """Why a run has to wait, in words; None if it need not. What the running ones may still grow by is theirs.

        One run is always let in: waiting could not make more room.
        """
        if not running:
            return None
        need = round(self._peak * SPARE) or ASSUMED
        left = _less(self._machine.free(), (need - each.held for each in running))
        if left is not None and left < need:
            return f"a run needs about {gib(need)} of memory, {gib(max(left, 0))} is left"
        if slot.gpu is None:
            return None
        need = round(self._gpu_peak * SPARE) or ASSUMED
        beside = [each for each in running if each.gpu == slot.gpu]
        left = _less(self._machine.gpu_free(slot.gpu), (0 if each.settled else need for each in beside))
        if beside and left is not None and left < need:
            return f"a run needs about {gib(need)} of GPU {slot.gpu}, {gib(max(left, 0))} is left"
        return None


def _less(free: int | None, owed: Iterable[int]) -> int | None:
    return None if free is None else free - sum(max(0, each) for each in owed)


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
