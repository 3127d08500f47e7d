"""Which updates the server takes, what is wrong with the others, and how many it needs for a round."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fl_sim.errors import InjectedCrash
from fl_sim.protocols import Update

LONGEST = 1e18
"""Longer updates are taken for broken: squared distances between them, and sums of those, would overflow."""

Reason: TypeAlias = Literal[
    "raised",
    "no_reply",
    "late",
    "stale",
    "duplicate",
    "wrong_client",
    "empty",
    "malformed",
    "wrong_name",
    "wrong_shape",
    "wrong_dtype",
    "not_finite",
    "too_long",
]


@dataclass(frozen=True)
class Refusal:
    """An update that the server does not take, or one that never came."""

    client: int | None
    """Whose answer it would have been; None if it came from a node that serves no client."""
    reason: Reason
    detail: str

    @property
    def own_error(self) -> bool:
        """Whether the client raised, and not because a crash was injected."""
        return self.reason == "raised" and InjectedCrash.__name__ not in self.detail


@dataclass(frozen=True)
class Replies:
    """What came of a cohort's orders: sound messages by client, and everything else."""

    updates: Mapping[int, Update]
    refusals: Sequence[Refusal] = ()
    underway: Sequence[int] = ()
    """Clients whose late reply will arrive when the next orders are out."""
    seconds: float | None = None
    """How long the server waited on the simulated clock; None where there is none."""


@dataclass
class Tally:
    """What a round's record says of its orders, over all attempts."""

    asked: int = 0
    attempts: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    seconds: float | None = None

    def add(self, asked: int, refusals: Sequence[Refusal], seconds: float | None) -> None:
        self.asked += asked
        self.attempts += 1
        self.refusals += refusals
        if seconds is not None:
            self.seconds = (self.seconds or 0.0) + seconds

    def fields(self, *, skipped: bool) -> dict[str, Any]:
        """How many updates were refused, for what, and whether the round came to nothing."""
        reasons = Counter[str](sorted(refusal.reason for refusal in self.refusals))
        found: dict[str, Any] = {"asked": self.asked, "attempts": self.attempts, "skipped": skipped}
        found |= {"refused": reasons.total(), "refused_for": dict(reasons)}
        return found if self.seconds is None else found | {"simulated_seconds": self.seconds}


def fault_in(delta: Tensor, vector: Tensor) -> tuple[Reason, str] | None:
    """What keeps a delta from being added to the global vector; None if nothing does."""
    if delta.shape != vector.shape:
        return "wrong_shape", f"the update's shape is {tuple(delta.shape)}, the model's {tuple(vector.shape)}"
    if delta.dtype != vector.dtype:
        return "wrong_dtype", f"the update is of {delta.dtype}, the model of {vector.dtype}"
    length = float(torch.linalg.vector_norm(delta))
    if length < LONGEST:
        return None
    if not bool(torch.isfinite(delta).all()):
        return "not_finite", "the update holds NaN or infinity"
    return "too_long", f"the update's norm is not below {LONGEST:g}"


def to_another(answered: Sequence[int], asked: Sequence[int]) -> str:
    """What to say of a reply to another round, or to another attempt at it, than is asked now."""
    there, here = (f"round {round_}" + f", attempt {n + 1}" * (n > 0) for round_, n in (answered, asked))
    return f"the reply is to {there}; asked was for {here}"


def needed(quorum: int | float, asked: int) -> int:
    """How many updates a round needs: a whole number as it stands, a share of those who were asked rounded up."""
    return quorum if isinstance(quorum, int) else math.ceil(quorum * asked - 1e-9)  # 0.55 · 100 is above 55
