"""Min-max (Shejwalkar & Houmansadr, NDSS 2021): as far from the honest mean as two honest updates are apart.

Every attacker sends μ + γ·∇^p with the largest γ for which max_i ‖μ + γ∇^p − ∇_i‖ ≤ max_{i,j} ‖∇_i − ∇_j‖ over the
honest updates: the attack that knows all updates but not the server's rule. Deviation: the paper bisects for γ;
each constraint is a quadratic in γ, so we take its root. Where no client is honest, the attackers' own updates serve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.collusion.perturbation import Perturbation, farthest, observed, perturbation, replaced
from fl_sim.protocols import ServerContext


def min_max(rows: Tensor, way: Tensor) -> Tensor:
    """μ + γ·∇^p for honest `rows` [N, P]."""
    mean = rows.mean(0)
    gaps = mean - rows
    widest = torch.cdist(gaps, gaps, compute_mode="donot_use_mm_for_euclid_dist").max()
    gamma = farthest(gaps.square().sum(1), gaps @ way, way.square().sum(), widest.square())
    return mean + gamma * way


@dataclass(frozen=True)
class MinMax:
    """All attackers send the honest mean, moved as far as the largest distance between honest updates allows."""

    perturbation: Perturbation = "std"

    def tamper(self, deltas: Tensor, malicious: Tensor, ctx: ServerContext) -> Tensor:
        rows = observed(deltas, malicious)
        return replaced(deltas, malicious, min_max(rows, perturbation(rows, self.perturbation)))
