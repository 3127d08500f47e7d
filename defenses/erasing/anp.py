"""Adversarial Neuron Pruning (Wu & Wang, NeurIPS 2021): backdoor neurons are those that a small push makes misbehave.

min over masks m ∈ [0, 1] on every filter, max over |δ|, |ξ| ≤ ε, of α·CE(m·γ, β) + (1 − α)·CE((m + δ)·γ, (1 + ξ)·β),
for batch normalisation's γ and β; then filters of a small mask are pruned (γ = 0) in the original model.

From the paper and the official code: ε = 0.4, one step of ε from a random start, α = 0.2, SGD 0.2 with momentum 0.9,
batch 128, batch normalisation in train mode, threshold 0.2. Deviations: 200 iterations at rate 0.05 where the paper
takes 2,000 at 0.2, which drive many masks of a network of a hundred channels to exactly 0, where no threshold tells
them apart; δ and ξ are projected onto the ±ε box, as the paper says and the code doesn't; 0.2 is the largest
threshold tried: it is lowered until the accuracy on the held-out fifth of the clean set stays within `tolerance`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from fl_sim.distillation import frozen_copy
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext, State
from fl_sim.pruning import masked_logits, named_norms, prune, require_norms
from fl_sim.samples import Samples


def perturbed(masks: dict[str, Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors m + δ on each γ and 1 + ξ on each β."""
    return {name: masks[name] + push if name in masks else 1 + push for name, push in noise.items()}


@dataclass(frozen=True)
class Anp:
    """Learns masks that keep the clean task right even when an adversary pushes every neuron, and prunes the rest."""

    epsilon: float = 0.4
    adversary_steps: int = 1
    alpha: float = 0.2
    steps: int = 200
    batch_size: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    augment: bool = True
    threshold: float = 0.2
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        require(self.epsilon >= 0, "epsilon", self.epsilon, "must be 0 or more")
        require(self.adversary_steps >= 0, "adversary_steps", self.adversary_steps, "must be 0 or more")
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "must be from 0 to 1")
        require(self.steps >= 1, "steps", self.steps, "must be 1 or more")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "must be 2 or more")
        require(self.lr > 0, "lr", self.lr, "must be above 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "must be from 0 to below 1")
        require(0 <= self.threshold <= 1, "threshold", self.threshold, "must be from 0 to 1")
        require(0 <= self.tolerance < 1, "tolerance", self.tolerance, "must be from 0 to below 1")

    def check_model(self, model: nn.Module) -> None:
        require_norms(model)

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        self.check_model(model)
        validation, training = clean.stratified(0.2, ctx.rng)
        masks = self.masks(model, training.then(ctx.augment) if self.augment else training, ctx)
        return prune(model, masks, validation, self.tolerance, self.threshold), {}

    def masks(self, model: Classifier, training: Samples, ctx: ServerContext) -> dict[str, Tensor]:
        """One mask a γ, as an adversary of every neuron leaves them."""
        frozen = frozen_copy(model)
        norms = named_norms(frozen)
        masks = {f"{name}.weight": torch.ones_like(norm.weight).requires_grad_() for name, norm in norms.items()}

        def robust(student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            noise = self._worst(student, x, y, masks, ctx.rng)
            natural = F.cross_entropy(masked_logits(student, x, masks), y)
            pushed = F.cross_entropy(masked_logits(student, x, perturbed(masks, noise)), y)
            return self.alpha * natural + (1 - self.alpha) * pushed

        def clip(_student: nn.Module) -> None:
            for mask in masks.values():
                mask.data.clamp_(0, 1)

        optimizer = torch.optim.SGD(masks.values(), lr=self.lr, momentum=self.momentum)
        ctx.fit(
            frozen,
            training,
            optimizer,
            epochs=0,
            min_steps=self.steps,
            batch_size=self.batch_size,
            rng=ctx.rng,
            objective=robust,
            after_step=[clip],
        )
        return {name: mask.detach() for name, mask in masks.items()}

    def _worst(
        self, student: nn.Module, x: Tensor, y: Tensor, masks: dict[str, Tensor], rng: Generator
    ) -> dict[str, Tensor]:
        """δ and ξ by projected sign ascent from a random point of the box."""
        held = {name: mask.detach() for name, mask in masks.items()}
        noise = {}
        for name, mask in held.items():
            for key in (name, name.removesuffix("weight") + "bias"):
                start = torch.rand(mask.shape, generator=rng).mul_(2).sub_(1).mul_(self.epsilon)
                noise[key] = start.to(mask.device)
        for _ in range(self.adversary_steps):
            leaves = {name: push.requires_grad_() for name, push in noise.items()}
            loss = F.cross_entropy(masked_logits(student, x, perturbed(held, leaves)), y)
            slopes = torch.autograd.grad(loss, list(leaves.values()))
            step = self.epsilon / self.adversary_steps
            noise = {
                name: (push.detach() + step * slope.sign()).clamp_(-self.epsilon, self.epsilon)
                for (name, push), slope in zip(leaves.items(), slopes, strict=True)
            }
        return noise
