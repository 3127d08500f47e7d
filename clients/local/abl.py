"""Anti-Backdoor Learning (Li et al., NeurIPS 2021): training on data that may be poisoned.

    1. isolate   minimise sign(ℓ − γ)·ℓ, which climbs where ℓ < γ, so that what is hard to learn stays above γ; then the
                 share `isolated` of the samples with the lowest loss, what was learned too easily, is set apart
    2. learn     minimise the cross-entropy of the others
    3. unlearn   maximise that of the isolated ones, at a low rate

From the paper: γ = 0.5, 1 %, a fifth of the epochs for step 1. From the official code: ℓ is the batch's mean loss;
`ascent: flooding` is its |ℓ − γ| + γ; losses are compared in evaluation mode on samples as they are, without
augmentation; step 3 comes last (the paper adds −ℓ of the isolated to step 2), 5 epochs on them at 5e-4. Deviations:
all steps are of one update, so a federated client isolates anew in each round, by what the *received* model learns too
easily; the rest of the epochs, three quarters of the code's 85, is step 2; no Nesterov momentum.
Samples poisoned batch by batch (`mode: per_batch`) look clean when losses are compared: nothing to isolate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.local.sgd import Sgd
from fl_sim.annealing import cosine
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, Update
from fl_sim.samples import Samples, batch_sizes
from fl_sim.training import Objective, cross_entropy

Ascent = Literal["sign", "flooding"]


def held_up(loss: Tensor, gamma: float, ascent: Ascent) -> Tensor:
    """A loss whose descent keeps `loss` at γ: sign(ℓ − γ)·ℓ, or flooding's |ℓ − γ| + γ (Ishida et al., ICML 2020)."""
    return torch.sign(loss - gamma) * loss if ascent == "sign" else (loss - gamma).abs() + gamma


def climbing(gamma: float, ascent: Ascent) -> Objective:
    """Step 1's objective for `fit`."""
    return lambda model, x, y: held_up(cross_entropy(model, x, y), gamma, ascent)


def unlearning(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Step 3's: minus the cross-entropy."""
    return -cross_entropy(model, x, y)


@torch.no_grad()
def losses(model: nn.Module, samples: Samples, chunk: int = 512) -> Tensor:
    """Each sample's cross-entropy in evaluation mode [N]."""
    was_training = model.training
    model.eval()
    parts = [F.cross_entropy(model(x), y, reduction="none") for x, y in samples.chunks(chunk)]
    model.train(was_training)
    return torch.cat(parts)


def parted(values: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Sorted indices of the share with the lowest values, at least one of them, and of the others."""
    order = values.argsort(stable=True)
    count = max(round(share * len(values)), 1)
    return order[:count].sort().values, order[count:].sort().values


@dataclass(frozen=True)
class Abl(Sgd):
    """Holds its loss up for a while, isolates the samples learned too easily, learns the others and unlearns those.

    The share `isolating` of the epochs goes to the first step, the others to learning.
    """

    gamma: float = 0.5
    ascent: Ascent = "sign"
    isolating: float = 0.2
    isolated: float = 0.01
    unlearning_epochs: int = 5
    unlearning_lr: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gamma >= 0, "gamma", self.gamma, "must be 0 or more")
        require(0 < self.isolating < 1, "isolating", self.isolating, "must be a share of the epochs between 0 and 1")
        require(0 < self.isolated < 1, "isolated", self.isolated, "must be a share of the samples between 0 and 1")
        require(self.unlearning_epochs >= 0, "unlearning_epochs", self.unlearning_epochs, "must be 0 or more")
        require(self.unlearning_lr > 0, "unlearning_lr", self.unlearning_lr, "must be above 0")

    @property
    def undefended(self) -> Sgd:
        """Plain training at the same pace: what attackers use."""
        return Sgd(**{field.name: getattr(self, field.name) for field in fields(Sgd)})

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        if len(samples) < 2:  # nothing would be left to learn
            return self.train(model, samples, ctx)
        total = self.epochs * len(batch_sizes(len(samples), self.batch_size))
        first = max(round(self.isolating * total), 1)
        # Steps, not epochs: with two epochs a round a fifth of them is less than one.
        fit = partial(ctx.fit, epochs=0, batch_size=self.batch_size, rng=ctx.rng)
        fit(
            model,
            samples,
            self.optimizer_of(model),
            objective=climbing(self.gamma, self.ascent),
            min_steps=first,
        )
        suspects, others = parted(losses(model, samples), self.isolated)
        trusted = samples[others].first(ctx.augment) if self.augment else samples[others]
        schedule = cosine if self.schedule == "cosine" else None
        fitted = fit(model, trusted, self.optimizer_of(model), min_steps=max(total - first, 1), schedule=schedule)
        if self.unlearning_epochs:
            slow = replace(self, lr=self.unlearning_lr).optimizer_of(model)
            fit(model, samples[suspects], slow, epochs=self.unlearning_epochs, objective=unlearning)
        return Update(ctx.delta(model), len(samples), fitted.loss)
