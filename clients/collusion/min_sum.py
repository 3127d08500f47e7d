"""Min-sum (Shejwalkar & Houmansadr, NDSS 2021): in sum as near to the honest updates as the outermost of them is.

Every attacker sends μ + γ·∇^p with the largest γ for which Σ_i ‖μ + γ∇^p − ∇_i‖² ≤ max_i Σ_j ‖∇_i − ∇_j‖² over the
honest updates. Deviation: the paper searches γ by bisection; the constraint is a quadratic in γ, so we take its
root. Where no client is honest, the attackers' own updates serve.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.collusion.perturbation import Perturbation, farthest, observed, perturbation, replaced
from fl_sim.protocols import ServerContext


def min_sum(rows: Tensor, way: Tensor) -> Tensor:
    """μ + γ·∇^p for honest `rows` [N, P].

    With a_i = ‖μ − ∇_i‖² the sums are Σ_j ‖∇_i − ∇_j‖² = Σ_j a_j + N·a_i and, as Σ_i (μ − ∇_i) = 0,
    Σ_i ‖μ + γ∇^p − ∇_i‖² = Σ_i a_i + N·γ²‖∇^p‖².
    """
    mean = rows.mean(0)
    squared = (mean - rows).square().sum(1)
    length = way.square().sum()
    gamma = farthest(length.new_zeros(1), length.new_zeros(1), length, squared.max())
    return mean + gamma * way


@dataclass(frozen=True)
class MinSum:
    """All attackers send the honest mean, moved until their summed distances reach the outermost honest update's."""

    perturbation: Perturbation = "std"

    def tamper(self, deltas: Tensor, malicious: Tensor, ctx: ServerContext) -> Tensor:
        rows = observed(deltas, malicious)
        return replaced(deltas, malicious, min_sum(rows, perturbation(rows, self.perturbation)))
