"""RLR, robust learning rate (Ozdayi, Kantarcioglu & Gel, AAAI 2021): unlearn where too few agree.

Of each coordinate, with θ: Δ = Σ_k w_k Δ_k if |Σ_k sign Δ_k| ≥ θ, else −Σ_k w_k Δ_k. The server's learning rate
changes its sign there. Deviation: θ is a share of the cohort; 0.4 stands for the paper's 4 of 10. Memory: chunks of
columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.aggregation.geometry import among_finite, column_parts
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


@dataclass(frozen=True)
class Rlr:
    """Averages, but steps backwards on coordinates whose signs do not outvote each other by `threshold` of all."""

    threshold: float = 0.4

    def __post_init__(self) -> None:
        require(0 <= self.threshold <= 1, "threshold", self.threshold, "must be a fraction from 0 to 1")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        least = math.ceil(self.threshold * len(deltas) - 1e-9)
        parts = []
        for part in column_parts(deltas):
            agreed = part.sign().sum(0).abs() >= least
            mean = weights @ part
            parts.append(torch.where(agreed, mean, -mean))
        return Aggregate(torch.cat(parts))
