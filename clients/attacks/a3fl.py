"""A3FL (Zhang et al., NeurIPS 2023): a trigger that survives the worst that the federation may do to it.

    δ* = argmin CE(f_θ(x ⊕ δ), target) + λ·CE(f_θ'(x ⊕ δ), target),   λ = λ₀·cos(θ', θ)
    θ' = θ trained on (x ⊕ δ, y): the global model, had it unlearned the trigger

δ by sign descent within the support of the configured trigger, from grey. Then the attack is data poisoning with δ,
boosted threefold, where the paper's attackers take part more often instead.
Official code: cos of the two models' gradients, λ₀ = 0.01, up to 200 epochs of step 0.01 each time; here one epoch of
larger steps, going on in each round from the attackers' record, so that learning costs little more than training.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clients.attacks.model_replacement import ModelReplacement
from clients.triggers.lira import wanted_entropy
from clients.triggers.pattern import Carried, descended, mixed, opacity
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import Trigger, Workshop
from fl_sim.samples import Samples, to_pixels
from fl_sim.training import fit, sgd


def parameters_cosine(a: Classifier, b: Classifier) -> Tensor:
    """cos of two models' parameter vectors."""
    one, other = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (a, b))
    return F.cosine_similarity(one, other, dim=0)


@dataclass(frozen=True)
class Adaptive(Carried):
    """A pattern learned against the received model and against a copy that has unlearned it."""

    epochs: int = 1
    step: float = 0.1
    balance: float = 1.0
    unlearn_epochs: int = 1
    unlearn_lr: float = 0.01
    batch_size: int = 32

    def begin(self, x: Tensor) -> Tensor:
        return torch.full_like(x[:1], 0.5)

    def unlearned(self, pattern: Tensor, hidden: Tensor, samples: Samples, workshop: Workshop) -> Classifier:
        """θ': the received model, trained to give stamped images their true labels."""
        stamped = mixed(to_pixels(samples.images), pattern, hidden)
        copy = deepcopy(workshop.model).requires_grad_(True)
        optimizer = sgd(copy, self.unlearn_lr, momentum=0.9, weight_decay=5e-4)
        cleansing = Samples(stamped, samples.labels)
        epochs, size = self.unlearn_epochs, self.batch_size
        fit(copy, cleansing, optimizer, epochs=epochs, batch_size=size, rng=workshop.rng)
        return copy.eval().requires_grad_(False)

    def improved(self, pattern: Tensor, samples: Samples, workshop: Workshop) -> Tensor:
        hidden = opacity(self.carrier, to_pixels(samples.images[:1]))
        adversary = self.unlearned(pattern, hidden, samples, workshop) if self.balance else workshop.model
        weight = self.balance * parameters_cosine(adversary, workshop.model)

        def loss(pattern: Tensor, x: Tensor, y: Tensor) -> Tensor:
            stamped = mixed(x, pattern, hidden)
            mine = wanted_entropy(stamped, y, workshop)
            if not self.balance:
                return mine
            return mine + weight * F.cross_entropy(adversary(stamped), workshop.goal.labels(y, workshop.classes))

        def step(pattern: Tensor, gradient: Tensor) -> Tensor:
            return (pattern - self.step * gradient.sign()).clamp(0, 1)

        return descended(pattern, samples, workshop, loss, step, epochs=self.epochs, batch_size=self.batch_size)


@dataclass(frozen=True)
class A3fl(ModelReplacement):
    """Learns a trigger that also works on an adversarially unlearned copy of the global model, and poisons with it."""

    boost: float | Literal["auto"] = 3.0
    trigger_epochs: int = 1
    trigger_step: float = 0.1
    balance: float = 1.0
    unlearn_epochs: int = 1
    unlearn_lr: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.trigger_epochs >= 1, "trigger_epochs", self.trigger_epochs, "must be 1 or more")
        require(self.trigger_step > 0, "trigger_step", self.trigger_step, "must be above 0")
        require(self.balance >= 0, "balance", self.balance, "must be 0 or more")
        require(self.unlearn_epochs >= 1, "unlearn_epochs", self.unlearn_epochs, "must be 1 or more")
        require(self.unlearn_lr > 0, "unlearn_lr", self.unlearn_lr, "must be above 0")

    def adopt(self, trigger: Trigger) -> Adaptive:
        """The configured trigger gives the pattern's place and opacity."""
        return Adaptive(
            trigger,
            epochs=self.trigger_epochs,
            step=self.trigger_step,
            balance=self.balance,
            unlearn_epochs=self.unlearn_epochs,
            unlearn_lr=self.unlearn_lr,
        )
