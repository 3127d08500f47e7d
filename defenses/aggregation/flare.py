"""FLARE (Wang et al., AsiaCCS 2022): trust clients whose models see the same images as most others' models do.

Penultimate representations of the local models on auxiliary images are compared pairwise by the unbiased maximum mean
discrepancy, with an RBF kernel of γ = 1/features; each client votes for the nearest half of the others; with c_k
votes, Δ = Σ_k S_k Δ_k, S = softmax(c_k / (τ · mean c)).

Deviations: the auxiliary images are drawn from the whole clean set, not from one class; the division by the mean
count is the official code's. Estimates below zero stay: cut off they would tie, and the first clients win the votes.
No weight is ever zero, so kept, for the record and the batch statistics, are the clients with at least one vote.
Ignores client weights. Memory: a model, and K · samples · features numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defenses.aggregation.geometry import among_finite
from defenses.aggregation.local_models import local_models, representations
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


def discrepancies(seen: Tensor) -> Tensor:
    """The squared MMD between each two clients' representations [K, N, D], unbiased."""
    clients, count, width = seen.shape
    flat = seen.flatten(0, 1)
    means = torch.stack(
        [torch.exp(-torch.cdist(each, flat).square() / width).view(count, clients, count).sum((0, 2)) for each in seen]
    )
    within = (means.diagonal() - count) / max(count * (count - 1), 1)
    return (within[:, None] + within - 2 * means / count**2).fill_diagonal_(0)


def votes(distances: Tensor) -> Tensor:
    """How many others count each client among the nearest half of theirs (at least one)."""
    count = len(distances)
    if count == 1:
        return distances.new_ones(1)
    others = distances.clone().fill_diagonal_(float("inf"))
    nearest = others.argsort(dim=1, stable=True)[:, : max(count // 2, 1)]
    return torch.bincount(nearest.flatten(), minlength=count).to(distances.dtype)


@dataclass(frozen=True)
class Flare:
    """Weighs updates by how many models are near theirs in what the penultimate layer makes of clean images."""

    needs_clean: ClassVar[bool] = True

    samples: int = 200
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(self.samples >= 2, "samples", self.samples, "must be 2 or more")
        require(self.temperature > 0, "temperature", self.temperature, "must be above 0")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        assert ctx.clean is not None
        shown = ctx.clean[torch.randperm(len(ctx.clean), generator=ctx.rng)[: self.samples]]
        seen = torch.stack([representations(model, shown) for model in local_models(deltas, ctx)])
        counts = votes(discrepancies(seen)).to(deltas)
        trust = torch.softmax(counts / (self.temperature * counts.mean()), 0)
        return Aggregate(trust @ deltas, counts > 0)
