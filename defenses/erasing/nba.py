"""NBA: neural behavioural alignment (Ying & Wu, Cybersecurity 2023). A reconstruction: there is no public code.

A teacher, the model fine-tuned on the clean set, and the model itself are aligned in three kinds of behaviour, once on
clean samples (learning distillation, LDL) and once on pseudo samples crafted so that the *student* shows backdoor
behaviour while the teacher sees the clean original (unlearning distillation, UDL):
L = CE(S(x), y) + LDL(S(x), T(x)) + u · UDL(S(x̃), T(x)).
response    Σ_l ‖Ĝ_S^l − Ĝ_T^l‖²      G = F Fᵀ of a tap's C×HW features, Ĝ = G/‖G‖: which channels fire together
learning    Σ_l ‖Ŵ_S^l − Ŵ_T^l‖²      W = F_l F_{l+1}ᵀ of adjacent taps pooled to one size: what becomes of them
prediction  T² · KL(teacher ‖ student) at temperature T = 4
pseudo      x̃ = x + δ, ‖δ‖_∞ ≤ 8/255, five steps of projected ascent on KL(T(x) ‖ S(x̃)); one δ for the whole batch

The paper's abstract names the three behaviours and the two losses. Ours are: the matrices' unit length and the squared
distance (independent of channels and image size, as for NAD's maps), all weights, T, the crafting, and the optimiser's
settings, which are NAD's. Pseudo samples go through the student in a pass of their own that leaves no trace in its
running statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from fl_sim.batch_statistics import frozen_statistics
from fl_sim.distillation import same_size, softened_kl
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext, State
from fl_sim.samples import Samples
from fl_sim.training import Objective
from fl_sim.tuning import Tuning

Crafting: TypeAlias = Literal["batch", "sample"]


def response(features: Tensor) -> Tensor:
    """The Gram matrix of each sample's channels, of unit length: [B, C, C]."""
    return _unit(_products(features, features))


def learning(first: Tensor, second: Tensor) -> Tensor:
    """The flow matrix between two adjacent taps' channels, of unit length: [B, C₁, C₂]."""
    return _unit(_products(*same_size(first.float(), second.float())))


def alignment(
    student: tuple[Tensor, Sequence[Tensor]],
    teacher: tuple[Tensor, Sequence[Tensor]],
    weights: tuple[float, float, float],
    temperature: float,
) -> Tensor:
    """How far two models' behaviours, each given as (logits, taps), are apart."""
    (logits, ours), (targets, theirs) = student, teacher
    responses = [_gap(response(s), response(t)) for s, t in zip(ours, theirs, strict=True)]
    flows = [_gap(learning(*s), learning(*t)) for s, t in zip(pairwise(ours), pairwise(theirs), strict=True)]
    parts = (sum(responses), sum(flows), softened_kl(logits, targets, temperature))
    return torch.stack([weight * torch.as_tensor(part) for weight, part in zip(weights, parts, strict=True)]).sum()


def craft(
    student: nn.Module, x: Tensor, targets: Tensor, radius: float, steps: int, rng: Generator, per: Crafting = "batch"
) -> Tensor:
    """x̃ within `radius` of x in every pixel, where the student in eval mode departs most from the targets' logits.

    By one change for the whole batch, as a trigger's is, or by one for each sample.
    """
    was_training = student.training
    student.eval()
    shape = x.shape if per == "sample" else (1, *x.shape[1:])
    change = radius * (2 * torch.rand(shape, generator=rng) - 1).to(x.device)
    for _ in range(steps):
        change.requires_grad_()
        departure = softened_kl(student((x + change).clamp(0, 1)), targets)
        (gradient,) = torch.autograd.grad(departure, change)
        # 2.5: the edge is reached from anywhere.
        change = (change.detach() + 2.5 * radius / steps * gradient.sign()).clamp(-radius, radius)
    student.train(was_training)
    return (x + change.detach()).clamp(0, 1)


def _products(first: Tensor, second: Tensor) -> Tensor:
    return torch.einsum("bchw,bdhw->bcd", first.float(), second.float())


def _unit(matrices: Tensor) -> Tensor:
    return F.normalize(matrices.flatten(1), dim=1, eps=1e-6).view_as(matrices)


def _gap(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).square().flatten(1).sum(1).mean()


@dataclass(frozen=True)
class Nba(Tuning):
    """Aligns the model's responses, their flow and predictions with a fine-tuned teacher's, on pseudo samples too."""

    teacher_epochs: int = 10
    response: float = 1.0
    learning: float = 1.0
    prediction: float = 1.0
    temperature: float = 4.0
    unlearning: float = 1.0
    radius: float = 8 / 255
    crafting: Crafting = "batch"
    crafting_steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.teacher_epochs >= 1, "teacher_epochs", self.teacher_epochs, "must be 1 or more")
        for key in ("response", "learning", "prediction", "unlearning"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must be 0 or more")
        require(self.temperature > 0, "temperature", self.temperature, "must be above 0")
        require(0 <= self.radius <= 1, "radius", self.radius, "must be from 0 to 1, in pixels of [0, 1]")
        require(self.crafting_steps >= 1, "crafting_steps", self.crafting_steps, "must be 1 or more")

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        teacher = self.tuned(model, clean, ctx, ctx.rng, epochs=self.teacher_epochs)
        return self.tuned(model, clean, ctx, ctx.rng, objective=self._objective(teacher, ctx.rng)), {}

    def _objective(self, teacher: Classifier, rng: Generator) -> Objective:
        weights = (self.response, self.learning, self.prediction)
        teacher.eval()

        def objective(student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            assert isinstance(student, Classifier)
            with torch.no_grad():
                goal = teacher.with_taps(x)
            seen = student.with_taps(x)
            loss = F.cross_entropy(seen[0], y) + alignment(seen, goal, weights, self.temperature)
            if not self.unlearning:
                return loss
            pseudo = craft(student, x, goal[0], self.radius, self.crafting_steps, rng, self.crafting)
            with frozen_statistics(student):
                seen = student.with_taps(pseudo)
            return loss + self.unlearning * alignment(seen, goal, weights, self.temperature)

        return objective
