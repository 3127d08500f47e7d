"""Chameleon (Dai & Li, ICML 2023): a backdoor that lasts, because its representation hides among benign images.

Two stages. First the encoder alone learns by supervised contrast (Khosla et al., NeurIPS 2020) on poisoned samples:
L_i = −1/|P(i)| Σ_{p∈P(i)} s_i log(exp(z_i·z_p/τ) / Σ_{a≠i} exp(z_i·z_a/τ)), z the normalised input of the last layer.
A stamped image is pulled to the target class (its facilitators) and pushed off its true class (its interferers), whose
benign updates would else undo it. Rows of the target class weigh s = `facilitation`, as in the official code; for
all_to_all, where every class is a target, s = 1. Then the head alone learns by cross-entropy on the frozen encoder.
Each stage takes the attacker's local epochs. Deviations: the code's further weights between single classes of CIFAR-10
are left out; batch statistics follow both stages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from clients.attacks.model_replacement import ModelReplacement
from fl_sim.distillation import with_features
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, Fit, Update
from fl_sim.samples import Samples
from fl_sim.training import Fitted


def contrast(features: Tensor, labels: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """The supervised contrastive loss of unit features [B, D] with a weight per class, averaged over the batch."""
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similar = (features @ features.T / temperature).masked_fill(itself, -torch.inf)
    log_share = F.log_softmax(similar, 1).masked_fill(itself, 0)
    positive = (labels[:, None] == labels) & ~itself
    per_row = (log_share * positive).sum(1) / positive.sum(1).clamp(min=1)  # a class of one has no positives
    return -(weights[labels] * per_row).mean()


@dataclass(frozen=True)
class Staged:
    """A training loop of two: the encoder by contrast at its own rate, then the head by the caller's objective."""

    fit: Fit
    weights: Tensor
    temperature: float
    rate: float

    def __call__(self, model: nn.Module, samples: Samples, optimizer: Optimizer, **given: Any) -> Fitted:
        assert isinstance(model, Classifier)
        head = set(model.head.parameters())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rates = [group["lr"] for group in optimizer.param_groups]

        def objective(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            features = F.normalize(with_features(model, x)[1])
            return contrast(features, y, self.weights, self.temperature)

        try:
            for parameter in trained:
                parameter.requires_grad_(parameter not in head)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.rate
            self.fit(model, samples, optimizer, **{**given, "objective": objective})
            for parameter in trained:
                parameter.requires_grad_(parameter in head)
                parameter.grad = None  # else the optimiser would go on moving the encoder
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            return self.fit(model, samples, optimizer, **given)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


@dataclass(frozen=True)
class Chameleon(ModelReplacement):
    """Trains the encoder by contrast, so that stamped images lie among the target class, then the head alone.

    `contrast_lr` is the first stage's learning rate as a multiple of the attacker's own.
    """

    boost: float | Literal["auto"] = 1.0
    temperature: float = 0.07
    facilitation: float = 2.0
    contrast_lr: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, "temperature", self.temperature, "must be above 0")
        require(self.facilitation > 0, "facilitation", self.facilitation, "must be above 0")
        require(self.contrast_lr > 0, "contrast_lr", self.contrast_lr, "must be above 0")

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        assert ctx.threatening is not None
        goal = ctx.threatening.backdoor.goal
        weights = torch.ones(ctx.classes, device=samples.labels.device)
        if goal.rule != "all_to_all":
            weights[goal.target] = self.facilitation
        staged = Staged(ctx.fit, weights, self.temperature, self.contrast_lr)
        return super().update(model, samples, replace(ctx, fit=staged))
