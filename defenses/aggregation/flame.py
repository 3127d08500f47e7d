"""FLAME (Nguyen et al., USENIX Security 2022): cluster, clip, blur.

HDBSCAN on the cosine distances of the local models w + Δ_k keeps the one cluster of more than half of them; the kept
updates are clipped to S, the median length of all; N(0, (λS)²) is added to the mean. λ = 0.001 for images, as in the
paper. Where HDBSCAN finds no majority all are kept (the paper leaves it open). Deviation: the kept are averaged by
their weights. Memory: chunks of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from defenses.aggregation.clustering import hdbscan, largest, to_numpy
from defenses.aggregation.geometry import among_finite, cosines_of, gram
from defenses.aggregation.mean import shares_of
from defenses.aggregation.norm_clipping import clipping_factors
from defenses.aggregation.weak_dp import gaussian
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


def shifted(products: Tensor, deltas: Tensor, origin: Tensor) -> Tensor:
    """⟨w + Δ_i, w + Δ_j⟩ from ⟨Δ_i, Δ_j⟩, without making the models."""
    along = (deltas @ origin).to(products.dtype)
    return products + along[:, None] + along + origin.to(products.dtype).square().sum()


def majority(cosines: Tensor) -> Tensor:
    """Who is in the cluster of more than half, by cosine distance; everyone if there is none."""
    count = len(cosines)
    distances = to_numpy((1 - cosines).clamp(min=0).fill_diagonal_(0))
    inside = largest(hdbscan(distances, smallest=count // 2 + 1, neighbours=1, single=True))
    kept = torch.from_numpy(inside).to(cosines.device)
    return kept if inside.any() else torch.ones_like(kept)


@dataclass(frozen=True)
class Flame:
    """Keeps the majority cluster, clips it to the median length and adds a little noise.

    `compare` says whose cosines are taken: the local models', as in the paper, or the updates'.
    """

    noise: float = 0.001
    compare: Literal["models", "updates"] = "models"

    def __post_init__(self) -> None:
        require(self.noise >= 0, "noise", self.noise, "must be 0 or more")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        products = gram(deltas)
        norms = products.diagonal().sqrt().to(deltas.dtype)
        if self.compare == "models":
            products = shifted(products, deltas, ctx.vector[: deltas.shape[1]])
        kept = majority(cosines_of(products))
        most = norms.quantile(0.5)
        clipped = (shares_of(weights, kept) * clipping_factors(norms, most)) @ deltas
        return Aggregate(clipped + self.noise * most * gaussian(deltas.shape[1], ctx), kept)
