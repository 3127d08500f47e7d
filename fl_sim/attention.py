"""Attention maps of features and distances between them (Zagoruyko & Komodakis, ICLR 2017; Li et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_sim.models.classifier import Classifier
from fl_sim.training import Objective

Distance: TypeAlias = Literal["squared", "norm", "mean_square"]


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    """A(F) = Σ_c |F_c|^p, flattened, divided by its L2 norm + 1e-6: [B, C, H, W] -> [B, H·W]."""
    wide = features.float()
    # For p = 2, the default, a plain square is the same number, sooner.
    maps = (wide.square() if power == 2 else wide.abs().pow(power)).sum(1).flatten(1)
    normalised: Tensor = maps / (maps.norm(dim=1, keepdim=True) + 1e-6)
    return normalised


def map_distance(student: Tensor, teacher: Tensor, distance: Distance) -> Tensor:
    """Between two batches of normalised maps [B, P], averaged over the batch.

    squared      ‖a − b‖², whose weight does not depend on the map's size: this project's default
    norm         ‖a − b‖, the formula of NAD's paper
    mean_square  ‖a − b‖² / P, the official code's
    """
    gap = student - teacher
    if distance == "squared":
        return gap.square().sum(1).mean()
    if distance == "norm":
        return torch.sqrt(gap.square().sum(1) + 1e-12).mean()  # the slack: no infinite gradient where the maps agree
    return gap.square().mean()


def spread(weights: Sequence[float], taps: int) -> list[float]:
    """One weight a tap: surplus weights are dropped, a missing one repeats the last."""
    return [*weights, *[weights[-1]] * (taps - len(weights))][:taps]


def attention_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Sequence[float],
    distance: Distance = "squared",
    power: float = 2.0,
) -> Tensor:
    """Σ_l β_l · d(Â_S^l, Â_T^l) over the tapped feature tensors."""
    terms = [
        weight * map_distance(attention_map(s, power), attention_map(t, power), distance)
        for s, t, weight in zip(student, teacher, spread(weights, len(student)), strict=True)
    ]
    return torch.stack(terms).sum()


def distillation(
    teacher: Classifier, weights: Sequence[float], distance: Distance = "squared", power: float = 2.0
) -> Objective:
    """Cross-entropy plus the attention loss towards a frozen teacher, as an objective for `fit`."""
    teacher.eval()

    def objective(student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(student, Classifier)
        logits, taps = student.with_taps(x)
        with torch.no_grad():
            _, targets = teacher.with_taps(x)
        return F.cross_entropy(logits, y) + attention_loss(taps, targets, weights, distance, power)

    return objective
