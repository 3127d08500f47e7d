"""Model-Contrastive Learning (Yue et al., 2023): stamped images shall look to the model as clean ones looked before.

A trigger is reverse-engineered: x' = stamped x. With f the model's penultimate features, f₀ those of the frozen
backdoored model and s = cos / T: L = −log [ e^{s(f(x'), f₀(x))} / (e^{s(f(x'), f₀(x))} + e^{s(f(x'), f₀(x'))}) ].

From the paper and the official code: T = 0.5, 20 epochs, batch 64, SGD 0.1 for one epoch, then 0.01, from the tenth
on 0.001, momentum 0.9, weight decay 1e-4, inversion by 100 Adam steps of rate 0.1 until 0.9 succeed. Deviations: the
target class, which the code is told, is the one of the smallest inverted mask; the trigger is a mask and a pattern,
where the code adds a pattern; the learning rate falls by 10 every 4 epochs, as in the other erasers of 20 epochs;
`min_steps`; L says nothing of clean images, so `cross_entropy` adds that of clean images with a weight (0: the
official loss alone).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_sim.distillation import frozen_copy, with_features
from fl_sim.errors import require
from fl_sim.inversion import Inversion, Stamp
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext, State
from fl_sim.samples import Samples
from fl_sim.training import Objective
from fl_sim.training import cross_entropy as classification
from fl_sim.tuning import Tuning


def contrast(features: Tensor, clean: Tensor, stamped: Tensor, temperature: float) -> Tensor:
    """L from features [B, D] of f(x'), f₀(x) and f₀(x'), averaged over the batch."""
    towards, away = F.cosine_similarity(features, clean), F.cosine_similarity(features, stamped)
    return F.softplus((away - towards) / temperature).mean()  # −log(e^a / (e^a + e^b)) = log(1 + e^{b − a})


def contrastive(victim: Classifier, stamp: Stamp, temperature: float, weight: float) -> Objective:
    """L plus `weight` times the cross-entropy of clean images."""
    frozen = frozen_copy(victim)

    def objective(student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(student, Classifier)
        stamped = stamp(x)
        with torch.no_grad():
            benign, malign = with_features(frozen, x)[1], with_features(frozen, stamped)[1]
        loss = contrast(with_features(student, stamped)[1], benign, malign, temperature)
        return loss + weight * classification(student, x, y) if weight else loss

    return objective


@dataclass(frozen=True)
class Mcl(Tuning):
    """Reverse-engineers a trigger, then pulls stamped images' features to clean ones and away from backdoored ones."""

    epochs: int = 20
    min_steps: int = 400
    lr_decay_epochs: int = 4
    temperature: float = 0.5
    cross_entropy: float = 1.0
    inversion: Inversion = field(default_factory=lambda: Inversion(steps=100, success=0.9))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, "temperature", self.temperature, "must be above 0")
        require(self.cross_entropy >= 0, "cross_entropy", self.cross_entropy, "must be 0 or more")

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        found = self.inversion.invert(model, clean, ctx.classes, ctx.rng)
        objective = contrastive(model, found.stamp(found.suspect), self.temperature, self.cross_entropy)
        return self.tuned(model, clean, ctx, ctx.rng, objective=objective), {}
