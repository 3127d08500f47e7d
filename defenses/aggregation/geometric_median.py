"""Geometric median, RFA (Pillutla, Kakade & Harchaoui, IEEE TSP 2022): argmin_v Σ_k w_k ‖Δ_k − v‖.

Smoothed Weiszfeld: v ← Σ β_k Δ_k / Σ β_k with β_k = w_k / max(ν, ‖Δ_k − v‖), from the weighted mean on. Every iterate
is a mean of the updates, so all distances follow from the inner products and an iteration costs K² instead of K·P.
Deviation: the paper stops after 3 iterations because each costs a secure aggregation; here they go on until v stands
still. Memory: chunks of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from defenses.aggregation.geometry import among_finite, gram
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


def weiszfeld(products: Tensor, weights: Tensor, iterations: int, smoothing: float) -> Tensor:
    """The shares of the updates in their geometric median, from their inner products."""
    products, weights = products.cpu(), weights.cpu().to(products.dtype)
    shares = weights / weights.sum()
    for _ in range(iterations):
        along = products @ shares
        distances = (products.diagonal() - 2 * along + shares @ along).clamp(min=0).sqrt()
        pulled = weights / distances.clamp(min=smoothing)
        pulled /= pulled.sum()
        step = pulled - shares
        # By v, not by the shares: 1e-10 of a huge update still carries v far away.
        still = bool((step @ products @ step).clamp(min=0).sqrt() <= 1e-9 * distances.median())
        shares = pulled
        if still:
            break
    return shares


@dataclass(frozen=True)
class GeometricMedian:
    """The point whose weighted distances to all updates have the smallest sum."""

    iterations: int = 100
    smoothing: float = 1e-6

    def __post_init__(self) -> None:
        require(self.iterations >= 0, "iterations", self.iterations, "must be 0 or more")
        require(self.smoothing > 0, "smoothing", self.smoothing, "must be above 0")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        shares = weiszfeld(gram(deltas), weights, self.iterations, self.smoothing)
        return Aggregate(shares.to(deltas) @ deltas)
