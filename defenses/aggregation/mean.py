"""Federated averaging (McMahan et al., AISTATS 2017): Σ_k w_k Δ_k."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fl_sim.protocols import Aggregate, ServerContext, State


def weighted_mean(deltas: Tensor, weights: Tensor, kept: Tensor | None = None) -> Tensor:
    """The mean of the kept rows by their weights; a row left out may hold anything, NaN too."""
    if kept is not None:
        deltas, weights = deltas[kept], weights[kept]
    return (weights / weights.sum()) @ deltas


@dataclass(frozen=True)
class Mean:
    """The weighted mean of all updates."""

    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        return Aggregate(weighted_mean(deltas, weights))
