"""Norm clipping (Sun et al. 2019): Σ_k w_k Δ_k · min(1, M/‖Δ_k‖₂). Memory: no copy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


def clipping_factors(norms: Tensor, most: Tensor | float) -> Tensor:
    """min(1, M/‖Δ‖), and 1 for a zero update."""
    return (most / norms.clamp(min=1e-12)).clamp(max=1)


@dataclass(frozen=True)
class NormClipping:
    """Shrinks updates longer than `max_norm` to it (null: to the median length of the round), then averages."""

    max_norm: float | None = 3.0

    def __post_init__(self) -> None:
        require(self.max_norm is None or self.max_norm > 0, "max_norm", self.max_norm, "must be null or above 0")

    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        norms = deltas.norm(dim=1)
        most = norms.quantile(0.5) if self.max_norm is None else self.max_norm
        return Aggregate((weights * clipping_factors(norms, most)) @ deltas)
