"""Coordinate-wise trimmed mean (Yin et al., ICML 2018). Memory: chunks of columns, sorted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.aggregation.geometry import among_finite, ascending, column_parts
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


def middle_mean(deltas: Tensor, trim: int) -> Tensor:
    """The mean of each column without its `trim` smallest and largest entries; column chunks bound the memory."""
    rows = len(deltas)
    return torch.cat([ascending(part)[trim : rows - trim].mean(0) for part in column_parts(deltas)])


@dataclass(frozen=True)
class TrimmedMean:
    """Drops the share `trim` of the smallest and of the largest values of each coordinate. Ignores weights."""

    trim: float = 0.2

    def __post_init__(self) -> None:
        require(0 <= self.trim < 0.5, "trim", self.trim, "must be a fraction from 0 to below 0.5")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        trim = int(self.trim * len(deltas) + 1e-9)  # 0.29 · 100 is just below 29
        return Aggregate(middle_mean(deltas, trim))
