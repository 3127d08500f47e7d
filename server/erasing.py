"""Erasing policies: when the server runs its eraser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median
from typing import ClassVar

from fl_sim.errors import require
from fl_sim.protocols import Decision, Signals


@dataclass(frozen=True)
class Policy:
    """What all policies share: an erased model is refused below `floor` times the clean-set accuracy it had."""

    floor: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.floor <= 1, "floor", self.floor, "must be a fraction from 0 to 1")


@dataclass(frozen=True)
class Never(Policy):
    """The eraser never runs."""

    def due(self, round_: int, rounds: int) -> bool:
        return False


@dataclass(frozen=True)
class Every(Policy):
    """Erases after rounds k, 2k, 3k, ..., with k = `rounds`."""

    rounds: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rounds >= 1, "rounds", self.rounds, "must be 1 or more")

    def due(self, round_: int, rounds: int) -> bool:
        return round_ % self.rounds == 0


@dataclass(frozen=True)
class AtEnd(Policy):
    """Erases once, after the last round."""

    def due(self, round_: int, rounds: int) -> bool:
        return round_ == rounds


@dataclass(frozen=True)
class Watchful(Policy):
    """What policies share that decide by what the server sees: nothing is due beforehand.

    They only watch for `patience` rounds, at first and after each erasing.
    """

    patience: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.patience >= 1, "patience", self.patience, "must be 1 or more rounds")

    @property
    def watches_clean_set(self) -> bool:
        return False

    def due(self, round_: int, rounds: int) -> bool:
        return False


@dataclass(frozen=True)
class OnSuspicion(Watchful):
    """Erases when something in the server's own sight departs from its running median.

    Against the median of up to `window` earlier rounds: the rejected share of updates has risen by `rejected`, the
    step's length or the clean set's loss is `step` or `loss` times as large, or the clean set's accuracy has fallen by
    `accuracy`; null leaves a signal out. A backdoor that is careful shows in none of them.
    """

    window: int = 10
    rejected: float | None = 0.3
    step: float | None = 2.0
    accuracy: float | None = 0.1
    loss: float | None = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window >= 1, "window", self.window, "must be 1 or more rounds")
        for key, least in (("rejected", 0.0), ("step", 1.0), ("accuracy", 0.0), ("loss", 1.0)):
            value = getattr(self, key)
            require(value is None or value > least, key, value, f"must be null or above {least:g}")

    @property
    def watches_clean_set(self) -> bool:
        return self.accuracy is not None or self.loss is not None

    def decide(self, signals: Signals) -> Decision:
        seen = signals.rounds_since_erasing - 1
        if seen < self.patience:
            return Decision(False, f"watching for {self.patience - seen} more")
        causes = [
            f"{name} {now:.4g}, usually {usual:.4g}" for name, now, usual, beyond in self.departures(signals) if beyond
        ]
        return Decision(bool(causes), "; ".join(causes) or "nothing unusual")

    def departures(self, signals: Signals) -> Iterator[tuple[str, float, float, bool]]:
        """(signal, now, its median, whether that is too far apart) of each signal that is watched and there."""
        if self.rejected is not None:
            now, usual = self._latest(signals.rejected)
            yield "rejected share", now, usual, now - usual > self.rejected
        if self.step is not None:
            now, usual = self._latest(signals.steps)
            yield "step", now, usual, not now <= self.step * usual
        if self.accuracy is not None and signals.accuracies:
            now, usual = self._latest(signals.accuracies)
            yield "clean accuracy", now, usual, usual - now > self.accuracy
        if self.loss is not None and signals.losses:
            now, usual = self._latest(signals.losses)
            yield "clean loss", now, usual, not now <= self.loss * usual

    def _latest(self, values: Sequence[float]) -> tuple[float, float]:
        """The last value and the median of those before; a broken one is never usual, but it counts as the last."""
        usual = [value for value in values[-1 - self.window : -1] if isfinite(value)]
        return values[-1], median(usual) if usual else values[-1]


@dataclass(frozen=True)
class Budget(Watchful):
    """Erases as often as a share of the run's time, or a number of seconds, allows.

    When all erasings so far and one more of their mean cost would take at most `share` of the time that the run will
    have taken then, and at most `seconds` (null: no limit) in all. The first one's cost is unknown, so it is taken for
    nothing: a dear one is paid for by a longer wait. A clock decides: the same seed need not erase in the same rounds.
    """

    by_clock: ClassVar[bool] = True
    share: float = 0.1
    seconds: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.share <= 1, "share", self.share, "must be a share above 0 and at most 1")
        require(self.seconds is None or self.seconds > 0, "seconds", self.seconds, "must be null or above 0")

    def decide(self, signals: Signals) -> Decision:
        if signals.rounds_since_erasing < self.patience:
            return Decision(False, "too soon")
        past = signals.erasing_seconds
        expected = sum(past) / len(past) if past else 0.0
        total = sum(past) + expected
        beyond = total > self.share * (signals.elapsed_seconds + expected)
        beyond |= self.seconds is not None and total > self.seconds
        return Decision(not beyond, "beyond the budget" if beyond else "within the budget")
