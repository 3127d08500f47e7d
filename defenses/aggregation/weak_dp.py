"""Weak differential privacy (Sun et al. 2019): Σ_k w_k Δ_k · min(1, M/‖Δ_k‖₂) + N(0, σ²).

The noise is added to every coordinate of the aggregate, far less than a privacy guarantee would ask for; it grows with
the model: its length is σ√P, which on a small model may exceed M. Memory: no copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.aggregation.geometry import among_finite
from defenses.aggregation.norm_clipping import clipping_factors
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


def gaussian(columns: int, ctx: ServerContext) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(columns, generator=ctx.rng).to(ctx.vector.device)


@dataclass(frozen=True)
class WeakDp:
    """Clips updates to `max_norm`, averages them and adds Gaussian noise of standard deviation `noise`."""

    max_norm: float = 3.0
    noise: float = 0.025

    def __post_init__(self) -> None:
        require(self.max_norm > 0, "max_norm", self.max_norm, "must be above 0")
        require(self.noise >= 0, "noise", self.noise, "must be 0 or more")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        clipped = (weights * clipping_factors(deltas.norm(dim=1), self.max_norm)) @ deltas
        return Aggregate(clipped + self.noise * gaussian(deltas.shape[1], ctx))
