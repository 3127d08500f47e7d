"""Search: Optuna chooses the next runs of a sweep by the results of earlier ones.

Hydra's Optuna plugin holds Optuna below version 3 and keeps a sweep in memory; this one uses Optuna itself, under the
plugin's names, and keeps the study beside the runs, so that an interrupted search goes on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from fl_sim.errors import FolderError, require
from fl_sim.folder import write_text
from fl_sim.launchers import library
from fl_sim.sweep import Job, Outcome
from fl_sim.tracking import read_metrics

SWEEPER = "hydra/sweeper"
OBJECTIVES = {"test_acc": "maximize", "test_asr": "minimize", "clean_acc": "maximize"}
"""What can be searched for, and which way is better. The names say where a number was measured."""
JOURNAL, RESULTS = "optuna.journal", "optimization_results.yaml"
Launch: TypeAlias = Callable[[Sequence[Job]], Iterator[Outcome]]
Direction: TypeAlias = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Choices:
    """One of several values, as they are typed."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Numbers:
    """A number from `low` to `high`, both included."""

    low: float
    high: float
    step: float | None = None
    whole: bool = False
    log: bool = False


Dimension: TypeAlias = Choices | Numbers


@dataclass(frozen=True)
class Sampler:
    """Which of Optuna's samplers, and its seed."""

    name: Literal["tpe", "random", "nsgaii"] = "tpe"
    seed: int | None = None


@dataclass(frozen=True)
class Search:
    """Optuna: `n_trials` trials, `n_jobs` of them asked for at a time, for the best of what `optimize` names."""

    optimize: Literal["test_acc", "test_asr", "clean_acc"] | tuple[str, ...] | None = None
    direction: Direction | tuple[Direction, ...] | None = None
    n_trials: int = 20
    n_jobs: int | None = None
    sampler: Sampler = field(default_factory=Sampler)
    study_name: str = "fl-sim"
    params: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        allowed = f"must say what is searched for: {', '.join(OBJECTIVES)}, or a list of these; see docs/sweeps.md"
        names = self.names
        require(bool(names) and all(name in OBJECTIVES for name in names), "optimize", self.optimize, allowed)
        require(len(set(names)) == len(names), "optimize", self.optimize, "names the same twice")
        fits = self.direction is None or len(self.directions) == len(names)
        require(fits, "direction", self.direction, "must be as many as optimize has names: minimize or maximize")
        require(self.n_trials >= 1, "n_trials", self.n_trials, "must be 1 or more")
        require(self.n_jobs is None or self.n_jobs >= 1, "n_jobs", self.n_jobs, "must be 1 or more trials at a time")

    @property
    def names(self) -> list[str]:
        if self.optimize is None:
            return []
        return [self.optimize] if isinstance(self.optimize, str) else list(self.optimize)

    @property
    def directions(self) -> list[str]:
        if self.direction is None:
            return [OBJECTIVES[name] for name in self.names]
        return [self.direction] if isinstance(self.direction, str) else list(self.direction)

    @property
    def sees_the_test_set(self) -> bool:
        return any(name.startswith("test_") for name in self.names)


@dataclass(frozen=True)
class Trial:
    """One point of the search: what was tried, and what came of it, averaged over its repeats; None: it failed."""

    params: Mapping[str, str]
    values: tuple[float, ...] | None
    reason: str = ""


class Study:
    """A search that is kept in a sweep's folder."""

    def __init__(self, search: Search, space: Mapping[str, Dimension], folder: Path) -> None:
        self._optuna = library("optuna", "optuna", SWEEPER)
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self._search, self._space, self._folder = search, space, folder
        journal = library("optuna.storages.journal", "optuna", SWEEPER).JournalFileBackend(str(folder / JOURNAL))
        storage = self._optuna.storages.JournalStorage(journal)
        self._study = self._optuna.create_study(
            study_name=search.study_name, storage=storage, directions=search.directions, load_if_exists=True
        )
        require_same(search, self._study.directions, folder)
        self._take_up()
        self._study.sampler = self._sampler()
        self._distributions = {key: self._distribution(each) for key, each in space.items()}

    @property
    def left(self) -> int:
        """Trials that are still to be made."""
        return max(0, self._search.n_trials - len(self._finished()))

    def ask(self, count: int) -> list[Any]:
        try:
            return [self._study.ask(self._distributions) for _ in range(count)]
        except ValueError as error:  # Optuna can't go on with other values of the same key
            raise FolderError(
                f"{self._folder / JOURNAL} is of another search: {error}; choose another name="
            ) from error

    def words(self, trial: Any) -> dict[str, str]:
        """A trial's values as they would be typed."""
        return {key: value if isinstance(value, str) else repr(value) for key, value in trial.params.items()}

    def tell(self, trial: Any, result: Trial) -> None:
        if result.values is None:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, list(result.values))

    def best(self) -> list[Trial]:
        """The best trial, or with several objectives those that no other one beats in all."""
        if not self._finished():
            return []
        return [Trial(self.words(each), tuple(each.values)) for each in self._study.best_trials]

    def write(self) -> Path:
        """What Hydra's plugin writes, where it writes it: in the sweep's folder."""
        best = self.best()
        names = self._search.names
        content: dict[str, Any] = {"name": "optuna", "optimize": names, "trials": len(self._finished())}
        if len(names) == 1:
            content |= {"best_params": dict(best[0].params), "best_value": (best[0].values or (None,))[0]}
        else:
            content["solutions"] = [{"params": dict(each.params), "values": list(each.values or ())} for each in best]
        path = self._folder / RESULTS
        write_text(path, yaml.safe_dump(content, sort_keys=False))
        return path

    def _finished(self) -> list[Any]:
        complete: list[Any] = self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.COMPLETE,))
        return complete

    def _take_up(self) -> None:
        """Trials that an interrupted search has left under way are asked for again: their runs are resumed."""
        states = self._optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            self._study.tell(trial.number, state=states.FAIL)
            if set(trial.params) == set(self._space):
                self._study.enqueue_trial(trial.params)

    def _sampler(self) -> Any:
        kinds = {"tpe": "TPESampler", "random": "RandomSampler", "nsgaii": "NSGAIISampler"}
        seed = self._search.sampler.seed
        # A search that goes on must not draw what it drew at its beginning once more.
        moved = None if seed is None else seed + len(self._study.get_trials(deepcopy=False))
        return getattr(self._optuna.samplers, kinds[self._search.sampler.name])(seed=moved)

    def _distribution(self, dimension: Dimension) -> Any:
        kinds = self._optuna.distributions
        if isinstance(dimension, Choices):
            return kinds.CategoricalDistribution(dimension.values)
        if dimension.whole:
            step = 1 if dimension.step is None else int(dimension.step)
            return kinds.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log, step=step)
        return kinds.FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)


def require_same(search: Search, directions: Sequence[Any], folder: Path) -> None:
    found = [direction.name.lower() for direction in directions]
    if found != search.directions:
        asked = ", ".join(search.directions)
        raise FolderError(f"{folder / JOURNAL} is of a search with other objectives ({', '.join(found)}, not {asked})")


def judged(search: Search, params: Mapping[str, str], outcomes: Sequence[Outcome]) -> Trial:
    """A trial by its runs: the mean of each objective, or why there is none."""
    rows = []
    for outcome in outcomes:
        if outcome.summary is None:
            return Trial(params, None, outcome.state)
        try:
            row = [_value(name, outcome) for name in search.names]
        except FolderError as error:
            return Trial(params, None, str(error))
        if any(value is None for value in row):
            missing = search.names[row.index(None)]
            return Trial(params, None, f"the run has recorded no {missing}")
        rows.append([value for value in row if value is not None])
    return Trial(params, tuple(statistics.fmean(column) for column in zip(*rows, strict=True)))


def _value(name: str, outcome: Outcome) -> float | None:
    if name.startswith("test_") and outcome.summary is not None:
        value: float | None = outcome.summary[name.removeprefix("test_")]
        return value
    if outcome.folder is None:
        return None
    seen = [event.get("clean_acc") for event in read_metrics(outcome.folder) if event["event"] == "round"]
    return next((value for value in reversed(seen) if value is not None), None)
