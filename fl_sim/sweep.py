"""Many runs: each checked, and executed in a folder that its configuration names, in turn or side by side."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fl_sim.errors import ConfigError, RunError

Job: TypeAlias = list[str]
Guard: TypeAlias = Callable[[Path], AbstractContextManager[None]]


@dataclass(frozen=True)
class Outcome:
    """What became of one job: its state, its summary if it finished, and a fault's trace if there was one."""

    job: tuple[str, ...]
    state: str
    summary: dict[str, Any] | None = None
    complaint: str = ""


def execute(job: Job, guard: Guard = lambda folder: nullcontext(), *, command: str = "run") -> Outcome:
    """Run, resume or find one job; a fault in it is told, not raised. `guard` surrounds the work in its folder."""
    from fl_sim import build, execution
    from fl_sim.folder import is_done, sweep_folder

    try:
        config = build.compose_config(job)
        settings = execution.prepare(config).parts.settings
        folder = sweep_folder(settings.output, settings.name, build.config_hash(config), command)
        with guard(folder):
            if not (folder / "config.yaml").exists():
                return Outcome(tuple(job), "finished", execution.start(config, folder, ["fl-sim", command, *job]))
            state = "found finished" if is_done(folder) else "resumed"
            return Outcome(tuple(job), state, execution.resume(folder))
    except (ConfigError, RunError) as error:
        return Outcome(tuple(job), f"failed: {error}", complaint=f"fl-sim: {error}")
    except Exception as error:  # a fault in one job must not stop the others; it is shown in full
        return Outcome(
            tuple(job), f"failed: {type(error).__name__}: {error}", complaint=traceback.format_exc().rstrip()
        )


def side_by_side(jobs: Sequence[Job], processes: int, *, command: str = "run") -> Iterator[Outcome]:
    """The outcomes as they come, of runs in `processes` processes with an equal share of the cores each."""
    from fl_sim.engines.inprocess import available_cores

    share = max(1, available_cores() // processes)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_settle, initargs=(share,)) as pool:
        futures = {pool.submit(_quietly, job, command): job for job in jobs}
        try:
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    reason = "a process was killed (out of memory?); the same command goes on with what is left"
                    yield Outcome(tuple(futures[future]), f"failed: {reason}", complaint=f"fl-sim: {reason}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _settle(cores: int) -> None:
    """Make a process of the pool quiet: Ctrl-C is for its parent, and it computes with its share of the cores."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(cores)
    if hasattr(os, "sched_setaffinity"):
        _pin(cores)


def _pin(cores: int) -> None:
    """Keep to `cores` of the cores, so that `engine.workers=auto` counts only these."""
    mine = sorted(os.sched_getaffinity(0))
    name = multiprocessing.current_process()._identity  # (1,), (2,), ... within the pool
    first = (name[0] - 1) * cores % len(mine) if name else 0
    os.sched_setaffinity(0, {mine[(first + offset) % len(mine)] for offset in range(cores)})


def _quietly(job: Job, command: str) -> Outcome:
    with contextlib.redirect_stdout(io.StringIO()):
        return execute(job, command=command)
