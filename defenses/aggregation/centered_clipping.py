"""Centred clipping (Karimireddy, He & Jaggi, ICML 2021): v ← v + Σ_k w_k (Δ_k − v) · min(1, τ/‖Δ_k − v‖).

v starts from the last round's aggregate, zero at first. From the paper: one iteration, τ = 10. Deviation: the paper's
clients send momenta; here they send updates, so there is nothing to smooth their noise. Memory: chunks of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.aggregation.geometry import among_finite, column_parts, precise
from defenses.aggregation.norm_clipping import clipping_factors
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


def distances_to(deltas: Tensor, center: Tensor) -> Tensor:
    """‖Δ_k − v‖."""
    squares = torch.zeros(len(deltas), dtype=precise(deltas.device), device=deltas.device)
    start = 0
    for part in column_parts(deltas):
        stop = start + part.shape[1]
        squares += (part - center[start:stop]).square().sum(1)
        start = stop
    return squares.sqrt().to(deltas.dtype)


@dataclass(frozen=True)
class CenteredClipping:
    """Clips updates to `radius` around the last aggregate, which it then moves by their mean."""

    radius: float = 10.0
    iterations: int = 1

    def __post_init__(self) -> None:
        require(self.radius > 0, "radius", self.radius, "must be above 0")
        require(self.iterations >= 1, "iterations", self.iterations, "must be 1 or more")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        past = state.get("center")
        center = past.to(deltas) if isinstance(past, Tensor) else deltas.new_zeros(deltas.shape[1])
        for _ in range(self.iterations):
            pull = weights * clipping_factors(distances_to(deltas, center), self.radius)
            center = (1 - pull.sum()) * center + pull @ deltas
        return Aggregate(center, state={"center": center.clone()})
