"""Reconstructive Neuron Pruning (Li et al., ICML 2023): unlearn the clean task, see which neurons recovery ignores.

Unlearn: gradient ascent on the clean set until the accuracy is at most CA_min; what the model still does is the
backdoor. Recover: with the unlearned weights frozen, min over masks m ∈ [0, 1] on every filter of CE: filters of the
backdoor are of no use to the clean task, and their masks fall. Prune those filters (γ = 0) in the original model.

From the official code: ascent by SGD 0.01, momentum 0.9, weight decay 5e-4, batch 128, 20 epochs at most, until the
training accuracy is 0.2; masks by SGD 0.2, momentum 0.9, 20 epochs, loss × 0.2; batch normalisation in train mode in
both. Its gradient clipping stands before the backward pass and does nothing, so there is none here. Deviations:
`unlearning_min_steps` lets ascent on a small clean set go on until it is at the floor, where the code's 20 epochs may
end long before; among masks that have come to exactly 0, which no threshold tells apart, those that came there first
are pruned first (their masks count as minus their share of the steps spent at 0); the threshold is the largest of the
masks' own values whose accuracy on the held-out fifth of the clean set stays within `tolerance`, where public code
takes test ASR into account. The paper's by-product, the backdoor's label (what the unlearned model predicts most),
serves no step and is not computed.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext, State
from fl_sim.pruning import masked_logits, named_norms, prune, require_norms
from fl_sim.samples import Samples, batch_sizes
from fl_sim.training import decayed, sgd


@dataclass(frozen=True)
class Rnp:
    """Unlearns the clean task, recovers it by masks on the filters, and prunes the filters that recovery left out."""

    accuracy_floor: float = 0.2
    unlearning_lr: float = 0.01
    unlearning_epochs: int = 20
    unlearning_min_steps: int = 400
    recovery_lr: float = 0.2
    recovery_epochs: int = 20
    recovery_weight: float = 0.2
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = True
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        require(0 <= self.accuracy_floor < 1, "accuracy_floor", self.accuracy_floor, "must be from 0 to below 1")
        for key in ("unlearning_lr", "recovery_lr", "recovery_weight"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be above 0")
        for key in ("unlearning_epochs", "recovery_epochs"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be 1 or more")
        require(self.unlearning_min_steps >= 0, "unlearning_min_steps", self.unlearning_min_steps, "must be 0 or more")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "must be 2 or more")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "must be from 0 to below 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")
        require(0 <= self.tolerance < 1, "tolerance", self.tolerance, "must be from 0 to below 1")

    def check_model(self, model: nn.Module) -> None:
        require_norms(model)

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        self.check_model(model)
        validation, training = clean.stratified(0.2, ctx.rng)
        training = training.then(ctx.augment) if self.augment else training
        masks = self.recover(self.unlearn(model, training, ctx), training, ctx)
        return prune(model, masks, validation, self.tolerance), {}

    def unlearn(self, model: Classifier, training: Samples, ctx: ServerContext) -> Classifier:
        """A copy that has lost the clean task: the epochs end as soon as one's accuracy is at the floor."""
        copy = deepcopy(model)
        optimizer = sgd(copy, self.unlearning_lr, momentum=self.momentum, weight_decay=self.weight_decay)
        right = torch.zeros((), device=training.labels.device)

        def ascent(student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            logits: Tensor = student(x)
            right.add_((logits.argmax(1) == y).sum())
            return -F.cross_entropy(logits, y)

        least = -(-self.unlearning_min_steps // len(batch_sizes(len(training), self.batch_size)))
        epochs = max(self.unlearning_epochs, least)
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = self.unlearning_lr * decayed(0.1, 0.5)(epoch / epochs)
            right.zero_()
            ctx.fit(copy, training, optimizer, epochs=1, batch_size=self.batch_size, rng=ctx.rng, objective=ascent)
            if float(right) <= self.accuracy_floor * len(training):
                break
        return copy

    def recover(self, unlearned: Classifier, training: Samples, ctx: ServerContext) -> dict[str, Tensor]:
        """The masks, one tensor per γ, with which the frozen unlearned model does the clean task best."""
        frozen = deepcopy(unlearned).requires_grad_(False)
        masks = {
            f"{name}.weight": torch.ones_like(each.weight).requires_grad_()
            for name, each in named_norms(frozen).items()
        }

        def recovery(student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return self.recovery_weight * F.cross_entropy(masked_logits(student, x, masks), y)

        idle = {name: torch.zeros_like(mask) for name, mask in masks.items()}

        def clip(_student: nn.Module) -> None:
            for name, mask in masks.items():
                mask.data.clamp_(0, 1)
                idle[name] += mask.detach() == 0

        fitted = ctx.fit(
            frozen,
            training,
            torch.optim.SGD(masks.values(), lr=self.recovery_lr, momentum=self.momentum),
            epochs=self.recovery_epochs,
            batch_size=self.batch_size,
            rng=ctx.rng,
            objective=recovery,
            after_step=[clip],
        )
        # Masks that have all come to 0 would share one threshold: the longer one has been there, the sooner it goes.
        return {name: torch.where(mask == 0, -idle[name] / fitted.steps, mask.detach()) for name, mask in masks.items()}
