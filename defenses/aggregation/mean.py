"""Federated averaging (McMahan et al., AISTATS 2017): Σ_k w_k Δ_k."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.aggregation.geometry import column_parts
from fl_sim.protocols import Aggregate, ServerContext, State


def shares_of(weights: Tensor, kept: Tensor) -> Tensor:
    """The kept clients' weights scaled to sum to one and zeros for the others; all zeros if none is kept."""
    chosen = weights * kept
    return chosen / chosen.sum().clamp(min=torch.finfo(chosen.dtype).tiny)


def weighted_mean(deltas: Tensor, weights: Tensor, kept: Tensor | None = None) -> Tensor:
    """The mean of the kept rows by their weights; a row left out may hold anything, NaN too."""
    if kept is None:
        return (weights / weights.sum()) @ deltas
    rows = kept.nonzero().squeeze(1)
    shares = weights[rows] / weights[rows].sum()
    return torch.cat([shares @ part[rows] for part in column_parts(deltas)])


@dataclass(frozen=True)
class Mean:
    """The weighted mean of all updates, broken ones too. Memory: no copy."""

    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        return Aggregate(weighted_mean(deltas, weights))
