"""Threat schedules: which clients are malicious, and in which rounds they attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from fl_sim.errors import require


@dataclass(frozen=True)
class Always:
    """A fixed random share of the clients is malicious and attacks whenever it takes part."""

    fraction: float = 0.2

    def __post_init__(self) -> None:
        require(0 <= self.fraction <= 1, "fraction", self.fraction, "must be a fraction from 0 to 1")

    def malicious(self, clients: int, rng: Generator) -> frozenset[int]:
        return frozenset(torch.randperm(clients, generator=rng)[: round(self.fraction * clients)].tolist())

    def active(self, round_: int) -> bool:
        return True


@dataclass(frozen=True)
class Window(Always):
    """The malicious clients attack in rounds `first` to `last` and are honest before and after."""

    first: int = 1
    last: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.first >= 1, "first", self.first, "must be round 1 or later")
        require(self.last >= self.first, "last", self.last, f"must not be before the first round, {self.first}")

    def active(self, round_: int) -> bool:
        return self.first <= round_ <= self.last


@dataclass(frozen=True)
class SingleShot(Always):
    """The malicious clients attack in one round only."""

    at: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.at >= 1, "at", self.at, "must be round 1 or later")

    def active(self, round_: int) -> bool:
        return round_ == self.at


@dataclass(frozen=True)
class Every(Always):
    """The malicious clients attack in every `rounds`-th round, from round `first` on."""

    rounds: int = 2
    first: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rounds >= 1, "rounds", self.rounds, "must be 1 or more")
        require(self.first >= 1, "first", self.first, "must be round 1 or later")

    def active(self, round_: int) -> bool:
        return round_ >= self.first and (round_ - self.first) % self.rounds == 0
