"""Many runs: each checked, and executed in a folder that its configuration names, in turn or side by side."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeAlias

from fl_sim.errors import ConfigError, RunError
from fl_sim.packing import CUDA_CONTEXT, VISIBLE, Guard, Holder, Machine, Slot, ThisMachine, forget_peak, slots
from fl_sim.tracking import METRICS

Job: TypeAlias = list[str]
WithFolder: TypeAlias = Callable[[Path], AbstractContextManager[None]]
Begun: TypeAlias = Callable[[Path, int], None]
"""Told of a run's folder and its number of rounds, once both are known."""
TICK = 0.5
PATIENCE = 2.0
"""Seconds between two looks at a run that another process is at."""
KILLED = "a process was killed (out of memory?); the same command goes on with what is left"


@dataclass(frozen=True)
class Outcome:
    """What became of one job: its state, its summary if it finished, and a fault's trace if there was one."""

    job: tuple[str, ...]
    state: str
    summary: dict[str, Any] | None = None
    complaint: str = ""
    folder: Path | None = None
    busy: bool = False
    """Another process is at this run: it is neither done nor failed."""


@dataclass(frozen=True)
class Running:
    """A run that is under way: where, and how many rounds it has to do (0: a centralized one)."""

    job: tuple[str, ...]
    folder: Path | None = None
    rounds: int = 0


@dataclass(frozen=True)
class View:
    """What a sweep is at: the runs under way, and why no more of them, if they could be more."""

    running: Sequence[Running] = ()
    held_up: str | None = None


Watch: TypeAlias = Callable[[View], None]


@dataclass(frozen=True)
class Placed:
    """A job with its configuration, checked by itself, and the folder that is its own."""

    job: Job
    config: dict[str, Any]
    folder: Path
    rounds: int


def place(job: Job, command: str = "run") -> Placed:
    """Compose and check a job; loads no data and writes nothing."""
    from fl_sim import build, composing
    from fl_sim.folder import sweep_folder

    config = composing.compose_config(job)
    settings = build.build(config).settings
    folder = sweep_folder(settings.output, settings.name, build.config_hash(config), command)
    return Placed(job, config, folder, settings.rounds if command == "run" else 0)


def execute(
    job: Job,
    guard: WithFolder = lambda folder: nullcontext(),
    *,
    command: str = "run",
    begun: Begun = lambda folder, rounds: None,
    patient: bool = False,
) -> Outcome:
    """Run, resume or find one job; a fault in it is told, not raised. `guard` surrounds the work in its folder.

    Of a run that another process is at, the outcome is `busy`; whoever is `patient` waits for that process's end.
    """
    from fl_sim import execution

    try:
        placed = place(job, command)
        begun(placed.folder, placed.rounds)
        while True:
            try:
                with guard(placed.folder):
                    done = execution.found(placed.folder)
                    if done is not None:
                        return Outcome(tuple(job), "found finished", done, folder=placed.folder)
                    state, summary = execution.take_up(placed.config, placed.folder, ["fl-sim", command, *job])
                    return Outcome(tuple(job), state, summary, folder=placed.folder)
            except execution.Busy as error:
                if not patient:
                    return Outcome(tuple(job), str(error), folder=placed.folder, busy=True)
                time.sleep(PATIENCE)
    except Exception as error:  # a fault in one job must not stop the others; it is shown in full
        return fault(job, error)


def fault(job: Job, error: Exception) -> Outcome:
    """The outcome of a job that an error ended; one that we have words for needs no trace."""
    if isinstance(error, (ConfigError, RunError)):
        return Outcome(tuple(job), f"failed: {error}", complaint=f"fl-sim: {error}")
    trace = "".join(traceback.format_exception(error)).rstrip()
    return Outcome(tuple(job), f"failed: {type(error).__name__}: {error}", complaint=trace)


def recorded(folder: Path) -> int:
    """How long a run's record is: it grows with every round."""
    try:
        return (folder / METRICS).stat().st_size
    except OSError:
        return 0


def in_turn(
    jobs: Sequence[Job], guard: WithFolder, *, command: str = "run", watch: Watch = lambda view: None
) -> Iterator[Outcome]:
    """The outcomes as they come, of runs in this process; one that another process is at comes once more at the end."""
    waiting = deque((job, False) for job in jobs)
    while waiting:
        job, patient = waiting.popleft()
        watch(View([Running(tuple(job))]))

        def begun(folder: Path, rounds: int, job: Job = job) -> None:
            watch(View([Running(tuple(job), folder, rounds)]))

        outcome = execute(job, guard, command=command, begun=begun, patient=patient)
        if outcome.busy:
            waiting.append((job, True))
        yield outcome


# Side by side ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class At:
    """A worker's word on its run: it is in this folder now."""

    folder: Path
    rounds: int


@dataclass(frozen=True)
class Ended:
    """A worker's word on its run: it has ended, and held that much of its GPU at most."""

    outcome: Outcome
    gpu_peak: int


@dataclass
class Worker:
    """A process that executes one run after another in its slot."""

    slot: Slot
    process: Any
    line: Connection
    running: Running | None = None
    recorded: int = 0
    """The length of the run's record when it began."""
    settled: bool = False


@dataclass
class Crew:
    """The workers of a sweep; each is started when a first run is there for its slot."""

    command: str
    slots: Sequence[Slot]
    workers: dict[Slot, Worker] = field(default_factory=dict)

    def busy(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.running is not None]

    def idle(self) -> list[Slot]:
        at_work = {worker.slot for worker in self.busy()}
        return [slot for slot in self.slots if slot not in at_work]

    def begin(self, slot: Slot, job: Job, patient: bool) -> None:
        worker = self.workers.get(slot)
        if worker is not None and not worker.process.is_alive():
            self.dismiss(worker)
            worker = None
        worker = worker or self._hired(slot)
        worker.running, worker.settled, worker.recorded = Running(tuple(job)), False, 0
        with contextlib.suppress(OSError):  # it has died this moment, which its sentinel will tell
            worker.line.send((job, patient))

    def dismiss(self, worker: Worker) -> None:
        """Take a dead worker off; its slot gets another one."""
        worker.line.close()
        worker.process.join()
        del self.workers[worker.slot]

    def end(self) -> None:
        """Workers without a run leave by themselves; others are ended, their runs' checkpoints being whole."""
        for worker in self.workers.values():
            worker.line.close()
            if worker.running is not None:
                worker.process.terminate()
        for worker in self.workers.values():
            worker.process.join(timeout=10)
            if worker.process.is_alive():
                worker.process.kill()

    def _hired(self, slot: Slot) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(slot, theirs, self.command), daemon=False)
        process.start()
        theirs.close()
        self.workers[slot] = Worker(slot, process, ours)
        return self.workers[slot]


def side_by_side(
    jobs: Sequence[Job],
    processes: int,
    *,
    command: str = "run",
    machine: Machine | None = None,
    watch: Watch = lambda view: None,
) -> Iterator[Outcome]:
    """The outcomes as they come, of runs in `processes` processes with an equal share of the cores each.

    A run begins when there is memory for it; one that another process is at comes once more at the end.
    """
    machine = machine or ThisMachine()
    guard = Guard(machine)
    crew = Crew(command, slots(max(1, min(processes, len(jobs))), machine, jobs))
    waiting = deque((job, False) for job in jobs)
    try:
        while waiting or crew.busy():
            held_up = _fill(crew, waiting, guard, machine)
            watch(View([worker.running for worker in crew.busy() if worker.running is not None], held_up))
            for worker in _heard(crew):
                for outcome in _news(crew, worker, guard, machine):
                    if outcome.busy:
                        waiting.append((list(outcome.job), True))
                    yield outcome
    finally:
        crew.end()


def _fill(crew: Crew, waiting: deque[tuple[Job, bool]], guard: Guard, machine: Machine) -> str | None:
    """Begin runs where there is a place and memory for them; why one has to wait, if memory is the reason."""
    complaint = None
    for slot in crew.idle():
        if not waiting:
            return None
        complaint = guard.complaint(slot, [_holder(worker, guard, machine) for worker in crew.busy()])
        if complaint is None:
            crew.begin(slot, *waiting.popleft())
    return complaint if waiting else None


def _holder(worker: Worker, guard: Guard, machine: Machine) -> Holder:
    held, peak = machine.held(worker.process.pid)
    if worker.running is not None and worker.running.folder is not None:
        # What a run needs shows once it has data, model and a round behind it; erasing may add to that.
        worker.settled = worker.settled or recorded(worker.running.folder) > worker.recorded
    if worker.settled:
        guard.note(peak)
    return Holder(worker.slot.gpu, held, worker.settled)


def _heard(crew: Crew) -> list[Worker]:
    """The workers that have something to say, or have died."""
    workers = crew.busy()
    ready = wait([each for worker in workers for each in (worker.line, worker.process.sentinel)], timeout=TICK)
    return [worker for worker in workers if worker.line in ready or worker.process.sentinel in ready]


def _news(crew: Crew, worker: Worker, guard: Guard, machine: Machine) -> Iterator[Outcome]:
    running = worker.running
    assert running is not None
    try:
        while worker.line.poll():
            said = worker.line.recv()
            if isinstance(said, At):
                worker.recorded = recorded(said.folder)
                worker.running = running = replace(running, folder=said.folder, rounds=said.rounds)
                continue
            if not said.outcome.busy and said.outcome.state != "found finished":
                guard.note(machine.held(worker.process.pid)[1], said.gpu_peak)
            worker.running = None
            yield said.outcome
            return
    except (EOFError, OSError):
        worker.process.join(timeout=10)
    if not worker.process.is_alive():
        status = worker.process.exitcode
        crew.dismiss(worker)
        reason = KILLED if status and status < 0 else f"a process ended with status {status}"
        yield Outcome(running.job, f"failed: {reason}", complaint=f"fl-sim: {reason}", folder=running.folder)


def _work(slot: Slot, line: Connection, command: str) -> None:
    """A worker's life: one job after another until the line is closed."""
    settle(slot)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            job, patient = line.recv()
        except (EOFError, OSError):
            return
        forget_peak()
        outcome = quietly(job, command, patient, lambda folder, rounds: line.send(At(folder, rounds)))
        line.send(Ended(outcome, _gpu_peak()))


def _die_with_parent() -> None:
    """A sweep that is killed takes its workers along: their runs lose nothing, and nobody works on unseen."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _gpu_peak() -> int:
    """What the run that has just ended held of the GPU at most, which is then given back and noted anew."""
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak + CUDA_CONTEXT


def settle(slot: Slot) -> None:
    """Make a process quiet: Ctrl-C is for its parent, and it computes on its share of the cores and its GPU."""
    if slot.gpu is not None:
        os.environ[VISIBLE] = slot.gpu  # before torch looks
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(slot.cores)
    if hasattr(os, "sched_setaffinity"):
        # Only these are counted by `engine.workers=auto`.
        mine = sorted(os.sched_getaffinity(0))
        first = slot.number * slot.cores % len(mine)
        os.sched_setaffinity(0, {mine[(first + offset) % len(mine)] for offset in range(slot.cores)})


def quietly(job: Job, command: str, patient: bool, begun: Begun = lambda folder, rounds: None) -> Outcome:
    """Execute a job whose rounds nobody reads on the terminal."""
    with contextlib.redirect_stdout(io.StringIO()):
        return execute(job, command=command, begun=begun, patient=patient)
