"""Misbehaviour that is no attack: clients that vanish, crash, come late or answer with garbage.

A fault is drawn for each client and round, so that a seed repeats, whatever the engine.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from fl_sim.errors import require
from fl_sim.protocols import Fault, Garbled

KINDS: tuple[Garbled, ...] = get_args(Garbled)
TOO_LONG = 1e20
"""Every entry of an update that is too long: finite, but its square is not."""


@dataclass(frozen=True)
class Sudden(ABC):
    """What faults without a clock share: each client with this probability in each round."""

    probability: float = 0.1
    deadline = None
    comes_later = False

    def __post_init__(self) -> None:
        _check_probability("probability", self.probability)

    def draw(self, rng: Generator) -> Fault:
        return self._fault(rng) if _uniform(rng) < self.probability else Fault()

    @abstractmethod
    def _fault(self, rng: Generator) -> Fault: ...


@dataclass(frozen=True)
class Dropout(Sudden):
    """Clients that never answer; they do not train either."""

    def _fault(self, rng: Generator) -> Fault:
        return Fault("silent")


@dataclass(frozen=True)
class Crashes(Sudden):
    """Clients that raise instead of training."""

    def _fault(self, rng: Generator) -> Fault:
        return Fault("crash")


@dataclass(frozen=True)
class Garbage(Sudden):
    """Clients that train and answer with what can't be used, all `kinds` alike."""

    kinds: tuple[Garbled, ...] = KINDS

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_kinds(self.kinds)

    def _fault(self, rng: Generator) -> Fault:
        return Fault(_one_of(self.kinds, rng))


@dataclass(frozen=True)
class Stragglers:
    """Clients whose replies take a log-normal time on a simulated clock; after the deadline the server goes on.

    The delay is median · exp(spread · z), z standard normal. Nobody sleeps: what is simulated is who comes in time.
    """

    median: float = 1.0
    spread: float = 0.5
    deadline: float | None = 2.0
    late: Literal["lost", "next_round"] = "lost"

    def __post_init__(self) -> None:
        require(self.median > 0, "median", self.median, "must be above 0 seconds")
        require(0 <= self.spread <= 20, "spread", self.spread, "must be from 0 to 20")
        positive = self.deadline is None or self.deadline > 0
        require(positive, "deadline", self.deadline, "must be null, which means none, or seconds above 0")

    @property
    def comes_later(self) -> bool:
        return self.late == "next_round"

    def draw(self, rng: Generator) -> Fault:
        return Fault(seconds=self.median * math.exp(self.spread * _normal(rng)))


@dataclass(frozen=True)
class Mixed(Stragglers):
    """All at once: stragglers, of whom some vanish, crash or answer with garbage, at most one of these at a time."""

    dropout: float = 0.05
    crash: float = 0.05
    garbage: float = 0.05
    kinds: tuple[Garbled, ...] = KINDS

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("dropout", "crash", "garbage"):
            _check_probability(key, getattr(self, key))
        together = self.dropout + self.crash + self.garbage
        most = f"with dropout and crash it must be at most 1, not {together:g}"
        require(together <= 1, "garbage", self.garbage, most)
        allowed = "must be seconds above 0 where clients vanish: the server would wait for ever"
        require(self.deadline is not None or self.dropout == 0, "deadline", self.deadline, allowed)
        _check_kinds(self.kinds)

    def draw(self, rng: Generator) -> Fault:
        seconds, level = super().draw(rng).seconds, _uniform(rng)
        if level < self.dropout:
            return Fault("silent")
        if level < self.dropout + self.crash:
            return Fault("crash", seconds)
        garbled = level < self.dropout + self.crash + self.garbage
        return Fault(_one_of(self.kinds, rng) if garbled else None, seconds)


def spoiled(delta: Tensor, kind: str | None) -> Tensor:
    """A delta with this fault, or the very same one if the fault is not in its numbers."""
    if kind in ("not_a_number", "infinite"):
        delta = delta.clone()  # the client may remember the other
        delta[0] = float("nan" if kind == "not_a_number" else "inf")
    elif kind == "too_long":
        delta = torch.full_like(delta, TOO_LONG)
    elif kind == "wrong_shape":
        delta = delta[:-1]
    elif kind == "wrong_dtype":
        delta = delta.half()
    return delta


def _uniform(rng: Generator) -> float:
    return float(torch.rand((), generator=rng, dtype=torch.float64))


def _normal(rng: Generator) -> float:
    return float(torch.randn((), generator=rng, dtype=torch.float64))


def _one_of(kinds: tuple[Garbled, ...], rng: Generator) -> Garbled:
    return kinds[int(torch.randint(len(kinds), (), generator=rng))]


def _check_probability(key: str, value: float) -> None:
    require(0 <= value <= 1, key, value, "must be a probability from 0 to 1")


def _check_kinds(kinds: tuple[Garbled, ...]) -> None:
    require(len(set(kinds)) == len(kinds) > 0, "kinds", list(kinds), f"must be some of {', '.join(KINDS)}, once each")
