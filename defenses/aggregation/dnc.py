"""DnC, divide and conquer (Shejwalkar & Houmansadr, NDSS 2021): drop what stands out along the main direction.

On random coordinates, with the centred updates' top right singular vector v: s_k = ⟨Δ_k − Δ̄, v⟩², and the c·f
highest are dropped. Kept are those that no repetition drops; if none is, the one of lowest summed score. c = 1 and
10,000 coordinates, as in the paper. Deviation: the kept are averaged by their weights. Memory: the drawn coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.aggregation.geometry import among_finite, gram, some_columns
from defenses.aggregation.krum import check_attackers, keep_best
from defenses.aggregation.mean import weighted_mean
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


def outlier_scores(updates: Tensor) -> Tensor:
    """The squared projections on the top right singular vector of the centred updates, on the host.

    With A = Σ u σ vᵀ, A v = σ u: the inner products' top eigenvector u gives them without v.
    """
    products = gram(updates - updates.mean(0)).cpu()
    values, vectors = torch.linalg.eigh(products)
    scores: Tensor = values[-1].clamp(min=0) * vectors[:, -1].square()
    return scores


@dataclass(frozen=True)
class Dnc:
    """Removes the updates that stick out along the direction in which they differ most.

    `attackers` is f, by default the number the server assumes; `drop` is c.
    """

    attackers: int | None = None
    drop: float = 1.0
    coordinates: int = 10000
    repetitions: int = 5

    def __post_init__(self) -> None:
        check_attackers(self.attackers)
        require(self.drop >= 0, "drop", self.drop, "must be 0 or more")
        require(self.coordinates >= 1, "coordinates", self.coordinates, "must be 1 or more")
        require(self.repetitions >= 1, "repetitions", self.repetitions, "must be 1 or more")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        attackers = ctx.assumed_attackers if self.attackers is None else self.attackers
        count = max(len(deltas) - int(self.drop * attackers + 1e-9), 1)
        total = torch.zeros(len(deltas), dtype=torch.float64)
        kept = torch.ones(len(deltas), dtype=torch.bool)
        for _ in range(self.repetitions):
            columns = some_columns(deltas.shape[1], self.coordinates, ctx.rng).to(deltas.device)
            scores = outlier_scores(deltas[:, columns])
            kept &= keep_best(scores, count)
            total += scores
        kept = (kept if kept.any() else keep_best(total, 1)).to(deltas.device)
        return Aggregate(weighted_mean(deltas, weights, kept), kept)
