"""`fl-sim run -m` and `fl-sim central -m`: a sweep from its command to its table."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fl_sim.console import shown, tell
from fl_sim.errors import ConfigError, require

if TYPE_CHECKING:
    from rich.console import Console

    from fl_sim.search import Search, Trial
    from fl_sim.sweep import Job, Outcome, WithFolder
    from fl_sim.sweep_plan import Plan
    from fl_sim.sweep_progress import SweepProgress


def outcomes(
    overrides: Sequence[str], flags: Mapping[str, str], command: str, console: Console, guard: WithFolder
) -> list[Outcome]:
    """What becomes of each job of a sweep, told as it comes. `guard` surrounds a run that this process executes."""
    from fl_sim import composing
    from fl_sim.sweep_plan import plan

    asked = _with_jobs(plan(overrides), flags)
    if asked.search is not None:
        require(command == "run", "hydra/sweeper", "optuna", "is for fl-sim run")
        return _searched(asked, asked.search, console, guard)
    jobs = [list(job) for job in dict.fromkeys(tuple(job) for job in composing.jobs(asked.overrides))]
    found = dict[tuple[str, ...], "Outcome"]()
    with _progress(asked, jobs, len(jobs), console) as progress:
        for outcome in _launched(asked, jobs, command, guard, progress):
            found[outcome.job] = outcome
    return [found[tuple(job)] for job in jobs]


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """A sweep's table, with the reason of each failure, and what to do about them."""
    from rich.table import Table

    from fl_sim.sweep_progress import in_common, told_apart

    table = Table()
    for heading in ("run", "ACC", "ASR", "highest ASR", ""):
        table.add_column(heading, justify="right" if heading.isupper() or "ASR" in heading else "left", overflow="fold")
    shared = in_common([outcome.job for outcome in outcomes])
    for outcome in outcomes:
        numbers = ("acc", "asr", "asr_max")
        row = (shown(outcome.summary[key]) if outcome.summary else "–" for key in numbers)
        table.add_row(told_apart(outcome.job, shared), *row, outcome.state)
    console.print(table)


def show_failures(outcomes: Sequence[Outcome], console: Console) -> None:
    """Which runs failed, each with its reason; nothing if none did."""
    failed = [outcome for outcome in outcomes if outcome.summary is None]
    for outcome in failed:
        console.print(f"{' '.join(outcome.job)}: {outcome.state}", soft_wrap=True)
    if failed:
        advice = "the same command tries these again and keeps the others"
        console.print(f"{len(failed)} of {len(outcomes)} runs failed; {advice}", soft_wrap=True)


def _with_jobs(asked: Plan, flags: Mapping[str, str]) -> Plan:
    """The plan with `--jobs N`, which is the basic launcher's `hydra.launcher.jobs=N`."""
    from fl_sim.launchers import Basic

    if "--jobs" not in flags:
        return asked
    said = flags["--jobs"]
    allowed = "must be auto or a whole number from 1 to 1024: how many runs at a time"
    require(said == "auto" or (said.isdecimal() and 1 <= int(said) <= 1024), "--jobs", said, allowed)
    if not isinstance(asked.launcher, Basic):
        raise ConfigError("--jobs", said, "is for the basic launcher; others have keys of their own, hydra.launcher.*")
    return replace(asked, launcher=Basic("auto" if said == "auto" else int(said)))


def _progress(asked: Plan, jobs: Sequence[Job], total: int, console: Console) -> SweepProgress:
    from fl_sim.launchers import Basic
    from fl_sim.sweep_progress import SweepProgress, in_common

    count = min(asked.launcher.at_once(jobs), max(1, total))
    side_by_side = count > 1 or not isinstance(asked.launcher, Basic)
    if side_by_side:
        console.print(f"{total} runs, {count} at a time", soft_wrap=True)
    return SweepProgress(total, stream=sys.stdout, side_by_side=side_by_side, shared=in_common(jobs))


def _launched(
    asked: Plan, jobs: Sequence[Job], command: str, guard: WithFolder, progress: SweepProgress
) -> Iterator[Outcome]:
    """The outcomes of the jobs, each counted and told as it comes."""
    coming = asked.launcher.launch(jobs, command, guard, progress.watch)
    try:
        while True:
            # Where the display is live, a run in this process has nothing to say beside it.
            with contextlib.redirect_stdout(io.StringIO()) if progress.live else contextlib.nullcontext():
                outcome = next(coming, None)
            if outcome is None:
                return
            progress.ended(outcome)
            if outcome.complaint:
                tell(outcome.complaint)
            if not outcome.busy:
                yield outcome
    except KeyboardInterrupt:
        tell("fl-sim: the same command goes on with what is left of the sweep")
        raise
    finally:
        close = getattr(coming, "close", None)
        if close is not None:
            close()


# Search ---------------------------------------------------------------------------------------------------------------


def _searched(asked: Plan, search: Search, console: Console, guard: WithFolder) -> list[Outcome]:
    """Trials in batches: asked for, launched with all their repeats, judged, told to the study."""
    from fl_sim import execution, sweep
    from fl_sim.folder import made
    from fl_sim.search import Study, judged
    from fl_sim.sweep_plan import space

    sought = space(asked.overrides)
    where = ("name=", "output=", "experiment=", "hydra.searchpath=")
    folder = made(sweep.place([word for word in sought.fixed if word.startswith(where)]).folder.parent)
    every: list[Outcome] = []
    with execution.alone(folder):
        study = Study(search, sought.searched, folder)
        if search.sees_the_test_set:
            names = ", ".join(name for name in search.names if name.startswith("test_"))
            console.print(f"{names}: this search selects by the test set; its best values are no test results")
        sample = [[*sought.fixed, *repeat] for repeat in sought.repeats]
        at_once = search.n_jobs or max(1, asked.launcher.at_once(sample * search.n_trials) // len(sample))
        with _progress(asked, sample * at_once, study.left * len(sample), console) as progress:
            left = study.left
            while left > 0:
                trials = study.ask(min(at_once, left))
                left -= len(trials)
                words = [study.words(trial) for trial in trials]
                groups = [[[*sought.fixed, *_typed(tried), *repeat] for repeat in sought.repeats] for tried in words]
                once = dict.fromkeys(tuple(job) for group in groups for job in group)  # a study may repeat itself
                coming = _launched(asked, [list(job) for job in once], "run", guard, progress)
                came = {outcome.job: outcome for outcome in coming}
                every += came.values()
                for trial, tried, group in zip(trials, words, groups, strict=True):
                    own = [came[tuple(job)] for job in group]
                    result = judged(search, tried, own)
                    study.tell(trial, result)
                    if result.values is None and all(each.summary is not None for each in own):
                        tell(f"fl-sim: {' '.join(_typed(tried))}: {result.reason}")
        _show_best(study.best(), search, console)
        if study.best():
            console.print(str(study.write()), soft_wrap=True)
    return every


def _typed(params: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in params.items()]


def _show_best(best: Sequence[Trial], search: Search, console: Console) -> None:
    if not best:
        console.print("no trial has succeeded yet")
    for trial in best:
        values = ", ".join(f"{name} {value:.4f}" for name, value in zip(search.names, trial.values or (), strict=True))
        console.print(f"best: {' '.join(_typed(trial.params))}: {values}", soft_wrap=True)
