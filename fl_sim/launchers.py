"""Launchers: what executes the runs of a sweep, by Hydra's names for them.

Hydra's own launcher plugins belong to `@hydra.main`: they compose each job anew, choose its folder and configure its
logging. These take a sweep's checked jobs instead, and use the libraries behind those plugins: joblib and submitit.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing import current_process
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from fl_sim import sweep
from fl_sim.errors import ConfigError, RunError, require
from fl_sim.packing import Slot, ThisMachine, how_many, slots
from fl_sim.sweep import Job, Outcome, Placed, Running, View, Watch, WithFolder

LAUNCHER = "hydra/launcher"
SLURMS_PARALLELISM = 256
"""Submitit's own default for `array_parallelism`."""
LOOK = 1.0
"""Seconds between two looks at submitted jobs."""


@runtime_checkable
class Launcher(Protocol):
    """Executes the runs of a sweep."""

    def at_once(self, jobs: Sequence[Job]) -> int:
        """How many of these runs it executes at a time, at most."""
        ...

    def launch(self, jobs: Sequence[Job], command: str, guard: WithFolder, watch: Watch) -> Iterator[Outcome]:
        """The outcomes as they come. `guard` surrounds what is executed in this process."""
        ...


@dataclass(frozen=True)
class Basic:
    """On this machine: in turn, or with `--jobs` side by side."""

    jobs: int | Literal["auto"] = 1

    def __post_init__(self) -> None:
        usable = self.jobs == "auto" or 1 <= self.jobs <= 1024
        require(usable, "jobs", self.jobs, "must be auto or a whole number from 1 to 1024: how many runs at a time")

    def at_once(self, jobs: Sequence[Job]) -> int:
        return how_many(self.jobs, ThisMachine(), jobs)

    def launch(self, jobs: Sequence[Job], command: str, guard: WithFolder, watch: Watch) -> Iterator[Outcome]:
        count = self.at_once(jobs)
        if count == 1:
            return sweep.in_turn(jobs, guard, command=command, watch=watch)
        return sweep.side_by_side(jobs, count, command=command, watch=watch)


def library(name: str, extra: str, key: str = LAUNCHER) -> Any:
    """A library that is imported only when it is asked for; without it, one line says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(key, extra, f'needs {name}: pip install "fl-sim[{extra}]"') from error


def placed(jobs: Sequence[Job], command: str) -> Iterator[Placed | Outcome]:
    """Each job checked before it leaves this machine: refused, found finished, or with its place."""
    from fl_sim import execution

    for job in jobs:
        try:
            each = sweep.place(job, command)
            done = execution.found(each.folder)
        except Exception as error:  # as in `sweep.execute`: one job's fault is not the others'
            yield sweep.fault(job, error)
            continue
        yield each if done is None else Outcome(tuple(job), "found finished", done, folder=each.folder)


def under_way(left: Mapping[int, Placed]) -> View:
    """Those of the handed-out runs whose folders are there."""
    there = [each for each in left.values() if (each.folder / "config.yaml").exists()]
    return View([Running(tuple(each.job), each.folder, each.rounds) for each in there])


@dataclass(frozen=True)
class Joblib:
    """In processes of joblib's."""

    n_jobs: int = -1
    verbose: int = 0
    timeout: float | None = None
    pre_dispatch: int | str = "2*n_jobs"
    temp_folder: str | None = None

    def __post_init__(self) -> None:
        require(self.n_jobs != 0, "n_jobs", self.n_jobs, "must be a number of processes; -1: one for each core")

    def at_once(self, jobs: Sequence[Job]) -> int:
        cores = ThisMachine().cores
        return max(1, self.n_jobs if self.n_jobs > 0 else cores + 1 + self.n_jobs)

    def launch(self, jobs: Sequence[Job], command: str, guard: WithFolder, watch: Watch) -> Iterator[Outcome]:
        joblib = library("joblib", "joblib")
        left = dict[int, Placed]()
        for number, each in enumerate(placed(jobs, command)):
            if isinstance(each, Outcome):
                yield each
            else:
                left[number] = each
        watch(under_way(left))
        places = slots(min(self.at_once(jobs), max(1, len(left))), ThisMachine(), jobs)
        pool = joblib.Parallel(backend="loky", return_as="generator_unordered", **asdict(self))
        with closing(pool(joblib.delayed(_numbered)(n, e.job, command, places) for n, e in list(left.items()))) as done:
            try:
                for number, outcome in done:
                    del left[number]
                    watch(under_way(left))
                    yield outcome
            except Exception as error:  # a process that is killed takes the whole pool along
                reason = f"joblib ended it: {type(error).__name__}; the same command goes on with what is left"
                for each in left.values():
                    yield Outcome(tuple(each.job), f"failed: {reason}", complaint=f"fl-sim: {reason}")


def _numbered(number: int, job: Job, command: str, places: Sequence[Slot]) -> tuple[int, Outcome]:
    """One job in a process of joblib's, which keeps to a slot as those of `--jobs` do."""
    name = re.search(r"(\d+)$", current_process().name)
    if name is not None and not hasattr(current_process(), "settled"):
        sweep.settle(places[int(name.group()) % len(places)])
        current_process().settled = True  # type: ignore[attr-defined]
    return number, sweep.quietly(job, command, patient=True)


class Submitted:
    """A job as submitit pickles it; one that runs out of time, or is preempted, is queued again and goes on."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __call__(self, job: Job) -> Outcome:
        return sweep.execute(job, command=self.command, patient=True)

    def checkpoint(self, job: Job) -> Any:
        """Asked by submitit before it requeues: nothing is lost, as every round has left its checkpoint."""
        return library("submitit", "submitit").helpers.DelayedSubmission(self, job)


@dataclass(frozen=True)
class SubmititLocal:
    """In processes that submitit starts on this machine as it would on a cluster: to try a sweep before queueing it."""

    submitit_folder: str | None = None
    timeout_min: int = 60
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    mem_gb: float | None = None
    name: str = "fl-sim"
    stderr_to_stdout: bool = False
    array_parallelism: int | None = None

    cluster = "local"
    own = ("submitit_folder", "array_parallelism")

    def __post_init__(self) -> None:
        require(self.timeout_min >= 1, "timeout_min", self.timeout_min, "must be a number of minutes, 1 or more")
        most = self.array_parallelism
        require(most is None or most >= 1, "array_parallelism", most, "must be 1 or more jobs at a time")

    def at_once(self, jobs: Sequence[Job]) -> int:
        return self.array_parallelism or max(1, ThisMachine().cores // (self.cpus_per_task or 1))

    def _handed_at_once(self, jobs: Sequence[Job]) -> int:
        return self.at_once(jobs)

    def launch(self, jobs: Sequence[Job], command: str, guard: WithFolder, watch: Watch) -> Iterator[Outcome]:
        submitit = library("submitit", "submitit")
        waiting, handed = dict[int, Placed](), dict[int, tuple[Placed, Any]]()
        for number, each in enumerate(placed(jobs, command)):
            if isinstance(each, Outcome):
                yield each
            else:
                waiting[number] = each
        if not waiting:
            return
        executor = self._executor(submitit, next(iter(waiting.values())).folder.parent)
        try:
            while waiting or handed:
                fitting = list(waiting)[: self._handed_at_once(jobs) - len(handed)]
                try:
                    handed |= self._submit(executor, {number: waiting.pop(number) for number in fitting}, command)
                except (RuntimeError, OSError) as error:
                    raise RunError(f"submitit can't queue the runs: {_last_line(error)}") from error
                watch(under_way({number: each for number, (each, _) in handed.items()}))
                for number in [number for number, (_, job) in handed.items() if job.done()]:
                    each, job = handed.pop(number)
                    yield _result(each, job)
                if handed:
                    time.sleep(LOOK)
        finally:
            self._abandon([job for _, job in handed.values()])

    def _executor(self, submitit: Any, sweep_folder: Path) -> Any:
        folder = self.submitit_folder or str(sweep_folder / ".submitit" / "%j")
        shared = {"timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb", "name", "stderr_to_stdout"}
        given = {key: value for key, value in asdict(self).items() if value is not None and key not in self.own}
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster, **self._limits_of_requeueing())
            named = {key if key in shared else f"{self.cluster}_{key}": value for key, value in given.items()}
            executor.update_parameters(**named)
        except (RuntimeError, ValueError, NameError, TypeError) as error:
            raise ConfigError(LAUNCHER, f"submitit_{self.cluster}", str(error).split("\n")[0]) from error
        return executor

    def _limits_of_requeueing(self) -> dict[str, Any]:
        return {}

    def _submit(self, executor: Any, chosen: Mapping[int, Placed], command: str) -> dict[int, tuple[Placed, Any]]:
        task = Submitted(command)
        return {number: (each, executor.submit(task, each.job)) for number, each in chosen.items()}

    def _abandon(self, jobs: Sequence[Any]) -> None:
        """A sweep that is stopped takes along what it has started on its own machine."""
        for job in jobs:
            job.cancel()


@dataclass(frozen=True)
class SubmititSlurm(SubmititLocal):
    """As an array of Slurm jobs, one for each run."""

    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    comment: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gres: str | None = None
    cpus_per_gpu: int | None = None
    gpus_per_task: int | None = None
    mem_per_gpu: str | None = None
    mem_per_cpu: str | None = None
    signal_delay_s: int = 120
    max_num_timeout: int = 3
    additional_parameters: Mapping[str, Any] | None = None
    setup: tuple[str, ...] | None = None
    srun_args: tuple[str, ...] | None = None

    cluster = "slurm"
    own = ("submitit_folder", "max_num_timeout")

    def at_once(self, jobs: Sequence[Job]) -> int:
        return self.array_parallelism or SLURMS_PARALLELISM

    def _handed_at_once(self, jobs: Sequence[Job]) -> int:
        return len(jobs)  # Slurm keeps to `array_parallelism` itself

    def _limits_of_requeueing(self) -> dict[str, Any]:
        return {"slurm_max_num_timeout": self.max_num_timeout}

    def _submit(self, executor: Any, chosen: Mapping[int, Placed], command: str) -> dict[int, tuple[Placed, Any]]:
        if not chosen:
            return {}
        jobs = executor.map_array(Submitted(command), [each.job for each in chosen.values()])
        return {number: (each, job) for (number, each), job in zip(chosen.items(), jobs, strict=True)}

    def _abandon(self, jobs: Sequence[Any]) -> None:
        """What is queued on the cluster stays there: the same command, given again, collects it."""


def _result(each: Placed, job: Any) -> Outcome:
    """What a submitted job brought back, or why it brought nothing."""
    try:
        outcome: Outcome = job.result()
        return outcome
    except Exception as error:  # submitit's own kinds, and whatever the job's process ended with
        reason = f"job {job.job_id} ended as {job.state}: {_last_line(error)}; its log is {job.paths.stderr}"
        return Outcome(tuple(each.job), f"failed: {reason}", complaint=f"fl-sim: {reason}", folder=each.folder)


def _last_line(error: Exception) -> str:
    """What a long story of another library comes to."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
