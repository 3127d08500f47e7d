"""CRFL, certifiably robust federated learning (Xie et al., ICML 2021): clip the global model, then perturb it.

w ← (w + Δ̄) · min(1, ρ_t/‖w + Δ̄‖) + N(0, σ²), ρ_t = base + growth · t. From the paper: EMNIST's ρ_t = 4 + 0.25t and
σ = 0.01. Expressed as a step, so exact under a plain server optimiser of rate 1. Deviations: the norm is that of the
parameters, not of batch statistics; the last round is noisy too; the certification by smoothing at test time is left
out. Clipping whole weights does not suit batch normalisation: there keep `base` above the model's own norm. Memory:
no copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from defenses.aggregation.geometry import among_finite
from defenses.aggregation.mean import weighted_mean
from defenses.aggregation.norm_clipping import clipping_factors
from defenses.aggregation.weak_dp import gaussian
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


@dataclass(frozen=True)
class Crfl:
    """Averages, shrinks the global model to a norm of `base + growth · round`, and adds noise to it."""

    base: float = 4.0
    growth: float = 0.25
    noise: float = 0.01

    def __post_init__(self) -> None:
        require(self.base > 0, "base", self.base, "must be above 0")
        require(self.growth >= 0, "growth", self.growth, "must be 0 or more")
        require(self.noise >= 0, "noise", self.noise, "must be 0 or more")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        before = ctx.vector[: deltas.shape[1]]
        mean = weighted_mean(deltas, weights)
        after = before + mean
        # Not after − before, which loses the digits of a small step where nothing is clipped.
        shrunk = (clipping_factors(after.norm(), self.base + self.growth * ctx.round) - 1) * after
        return Aggregate(mean + shrunk + self.noise * gaussian(deltas.shape[1], ctx))
