"""Erasing policies: when the server runs its eraser."""

from __future__ import annotations

from dataclasses import dataclass

from fl_sim.errors import require


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
