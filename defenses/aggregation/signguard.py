"""SignGuard (Xu, Huang, Song & Lan, ICDCS 2022): keep updates of usual length whose signs are of the usual mix.

With M the median length: kept are updates with low ≤ ‖Δ_k‖/M ≤ high that also fall into the largest mean-shift
cluster of (share of positive, zero, negative signs) on a random tenth of the coordinates. The kept are clipped to M
and averaged. low = 0.1 and high = 3, as in the paper; bandwidth as in the official code. Deviations: the plain
variant, without a similarity feature; averaged by weights. Memory: the drawn coordinates, 0.1 of the stack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.aggregation.clustering import largest, mean_shift, to_numpy
from defenses.aggregation.geometry import among_finite, some_columns
from defenses.aggregation.mean import shares_of
from defenses.aggregation.norm_clipping import clipping_factors
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


def sign_shares(updates: Tensor) -> Tensor:
    """The shares of positive, zero and negative entries of each row, [K, 3]."""
    return torch.stack(
        [(updates > 0).float().mean(1), (updates == 0).float().mean(1), (updates < 0).float().mean(1)], 1
    )


@dataclass(frozen=True)
class SignGuard:
    """Filters by length and by the statistics of signs, clips to the median length, averages."""

    low: float = 0.1
    high: float = 3.0
    share: float = 0.1

    def __post_init__(self) -> None:
        require(0 <= self.low <= 1, "low", self.low, "must be from 0 to 1")
        require(self.high >= 1, "high", self.high, "must be 1 or more")
        require(0 < self.share <= 1, "share", self.share, "must be a fraction above 0, at most 1")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        norms = deltas.norm(dim=1)
        most = norms.quantile(0.5)
        usual = (norms >= self.low * most) & (norms <= self.high * most)
        columns = some_columns(deltas.shape[1], math.ceil(self.share * deltas.shape[1]), ctx.rng).to(deltas.device)
        alike = largest(mean_shift(to_numpy(sign_shares(deltas[:, columns]))))
        kept = usual & torch.from_numpy(alike).to(deltas.device)
        return Aggregate((shares_of(weights, kept) * clipping_factors(norms, most)) @ deltas, kept)
