"""`fl-sim` in forks of one process that has imported everything: many real processes at the price of few imports.

That process must not have computed anything with torch yet, or its forks hang; so scripts use this, not pytest's own
process.
"""

from __future__ import annotations

import importlib
import mmap
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import conftest  # noqa: F401  (quiet libraries, one thread)

from fl_sim import execution, summary
from fl_sim.cli import main
from fl_sim.rounds import Federation

PHASES = ("before the first round", "training", "aggregation", "erasing", "evaluation", "checkpoint", "summary", "end")
"""What a run is at, as a killer wants to know it."""
STEPS = {
    "_collect": "training",
    "_aggregate": "aggregation",
    "_erase": "erasing",
    "_score": "evaluation",
    "_save": "checkpoint",
    "_detect": "summary",
}
MARK = "FL_SIM_TEST_FORK"
"""In the environment of all that a fork starts: its own process's id."""


def warm() -> None:
    """Import what a run imports on its way, or each fork would."""
    names = ("torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg", "server.app", "clients.app")
    for name in names:
        importlib.import_module(name)
    warnings.simplefilter("error")


def forked(
    words: Sequence[str],
    folder: Path,
    told: Path,
    *,
    pictures: bool = False,
    cpu_seconds: int | None = None,
    memory: int | None = 6 << 30,
    phase: mmap.mmap | None = None,
) -> int:
    """Begin `fl-sim` with these words in `folder`, its stderr into the file `told`; the process's id."""
    child = os.fork()
    if not child:
        _be_the_child(words, folder, told, pictures, cpu_seconds, memory, phase)
    return child


def _be_the_child(
    words: Sequence[str],
    folder: Path,
    told: Path,
    pictures: bool,
    cpu_seconds: int | None,
    memory: int | None,
    phase: mmap.mmap | None,
) -> None:
    """Never returns."""
    status = 99
    try:
        os.chdir(folder)
        os.environ[MARK] = str(os.getpid())
        if memory is not None:  # what asks for terabytes must not get 20 GB
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        if cpu_seconds is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        if not pictures:
            summary.draw = lambda *_: None
            execution.draw_partitions = lambda *_: None
            execution.draw_attention = lambda *_: None
        if phase is not None:
            _say_where(phase)
        status = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _say_where(phase: mmap.mmap) -> None:
    """Note in shared memory what the run is at."""

    def telling(inner: Callable[..., object], name: str) -> Callable[..., object]:
        def told(*given: object, **named: object) -> object:
            before, phase[0] = phase[0], PHASES.index(name)
            try:
                return inner(*given, **named)
            finally:
                phase[0] = before

        return told

    for step, name in STEPS.items():
        setattr(Federation, step, telling(getattr(Federation, step), name))
    execution.summarise = telling(execution.summarise, "summary")


def started_by(child: int) -> dict[int, str]:
    """The processes that a fork started and that are still there, by id, with their commands."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"\0{MARK}={child}\0".encode() in b"\0" + (path / "environ").read_bytes()
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended meanwhile, or is another user's
            continue
        if marked and command:  # a process that has ended and is not waited for has neither
            found[int(path.name)] = command
    return found


def ended(child: int, seconds: float) -> int | None:
    """Its exit status, negative for a signal; None if it is still at work after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.002)
    return None
