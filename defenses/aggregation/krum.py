"""Krum and multi-Krum (Blanchard et al., NeurIPS 2017).

An update's score is Σ ‖Δ_i − Δ_j‖² over its n − f − 2 nearest others; the lowest win. Memory: chunks of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.aggregation.geometry import among_finite, squared_distances
from defenses.aggregation.mean import weighted_mean
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


def neighbour_scores(distances: Tensor, attackers: int) -> Tensor:
    """The sum of each row's n − f − 2 smallest distances to others (at least one, at most all)."""
    count = len(distances)
    if count == 1:
        return distances.new_zeros(1)
    neighbours = min(max(count - attackers - 2, 1), count - 1)
    others = distances.clone().fill_diagonal_(float("inf"))
    return others.sort(1).values[:, :neighbours].sum(1)


def krum_scores(deltas: Tensor, attackers: int) -> Tensor:
    """Each update's summed squared distance to its nearest others."""
    return neighbour_scores(squared_distances(deltas), attackers)


def keep_best(scores: Tensor, count: int) -> Tensor:
    """A mask of the `count` lowest scores; of equal scores the first."""
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    kept[scores.argsort(stable=True)[:count]] = True
    return kept


def check_attackers(attackers: int | None) -> None:
    require(attackers is None or attackers >= 0, "attackers", attackers, "must be null or 0 or more")


@dataclass(frozen=True)
class Krum:
    """Takes the one update that is closest to its neighbours.

    `attackers` is f, by default the number the server assumes.
    """

    attackers: int | None = None

    def __post_init__(self) -> None:
        check_attackers(self.attackers)

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        attackers = ctx.assumed_attackers if self.attackers is None else self.attackers
        kept = keep_best(krum_scores(deltas, attackers), 1)
        return Aggregate(weighted_mean(deltas, weights, kept), kept)


@dataclass(frozen=True)
class MultiKrum:
    """Averages the `keep` updates of lowest Krum score, by default n − f of them."""

    attackers: int | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        check_attackers(self.attackers)
        require(self.keep is None or self.keep >= 1, "keep", self.keep, "must be null or 1 or more")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        attackers = ctx.assumed_attackers if self.attackers is None else self.attackers
        keep = max(len(deltas) - attackers, 1) if self.keep is None else self.keep
        kept = keep_best(krum_scores(deltas, attackers), keep)
        return Aggregate(weighted_mean(deltas, weights, kept), kept)
