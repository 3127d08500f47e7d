"""Attention maps of features and distances between them (Zagoruyko & Komodakis, ICLR 2017; Li et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
    betas = spread(weights, len(student))
    if distance == "squared" and power == 2 and not any(t.requires_grad for t in teacher):
        targets = [attention_map(t) for t in teacher]
        loss: Tensor = _SquaredGap.apply(betas, targets, *(s.float() for s in student))
        return loss
    terms = [
        weight * map_distance(attention_map(s, power), attention_map(t, power), distance)
        for s, t, weight in zip(student, teacher, betas, strict=True)
    ]
    return torch.stack(terms).sum()


class _SquaredGap(torch.autograd.Function):
    """The default loss, Σ_l β_l · mean_b ‖Â_S^l − Â_T^l‖², with its gradient by hand: half the time of autograd's.

    With m = Σ_c F_c², n = ‖m‖, s = n + 1e-6, Â = m/s and g = ∂L/∂Â = 2β (Â − Â_T) / B:
    ∂L/∂m = (g − Â · ⟨g, m⟩ / n) / s and ∂L/∂F = 2F · ∂L/∂m.
    """

    @staticmethod
    def forward(ctx: Any, weights: Sequence[float], targets: Sequence[Tensor], *features: Tensor) -> Tensor:
        total, kept = features[0].new_zeros(()), list[Tensor]()
        for weight, target, feature in zip(weights, targets, features, strict=True):
            energy = feature.square().sum(1).flatten(1)
            length = energy.norm(dim=1, keepdim=True)
            map_, scale = energy / (length + 1e-6), weight / len(feature)
            gap = map_ - target
            total += scale * gap.square().sum()
            along = (gap * energy).sum(1, keepdim=True) / length.clamp(min=1e-30)  # a map of zeros pulls nowhere
            pull = (gap - map_ * along) * (4 * scale) / (length + 1e-6)
            kept += [feature, pull.view(len(feature), 1, *feature.shape[2:])]
        ctx.save_for_backward(*kept)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        return None, None, *(f * (pull * outer) for f, pull in zip(kept[::2], kept[1::2], strict=True))


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
