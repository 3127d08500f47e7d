"""Coordinate-wise median (Yin et al., ICML 2018). Memory: chunks of columns, sorted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from defenses.aggregation.geometry import among_finite
from defenses.aggregation.trimmed_mean import middle_mean
from fl_sim.protocols import Aggregate, ServerContext, State


@dataclass(frozen=True)
class Median:
    """The median of each coordinate; of an even number the mean of the two in the middle. Ignores weights."""

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        return Aggregate(middle_mean(deltas, (len(deltas) - 1) // 2))
