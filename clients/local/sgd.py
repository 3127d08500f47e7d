"""Local SGD, the client of federated averaging (McMahan et al., AISTATS 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch.optim import Optimizer

from fl_sim.annealing import cosine
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, Update
from fl_sim.samples import Samples
from fl_sim.training import Hook, Objective, cross_entropy, sgd


@dataclass(frozen=True)
class Sgd:
    """`epochs` of SGD on the client's own samples, from the received model on.

    `schedule: cosine` lets the learning rate fall to zero within *each* update.
    """

    epochs: int = 2
    batch_size: int = 32
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    augment: bool = False

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", self.epochs, "must be 1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "must be 1 or more")
        require(self.lr > 0, "lr", self.lr, "must be above 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "must be from 0 to below 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        return self.train(model, samples, ctx)

    def train(
        self,
        model: Classifier,
        samples: Samples,
        ctx: ClientContext,
        after_backward: Sequence[Hook] = (),
        objective: Objective = cross_entropy,
    ) -> Update:
        """The same with hooks or another objective: what FedProx and its like add to it."""
        augmented = samples.first(ctx.augment) if self.augment else samples
        schedule = cosine if self.schedule == "cosine" else None
        fit = partial(ctx.fit, epochs=self.epochs, batch_size=self.batch_size, rng=ctx.rng, schedule=schedule)
        fitted = fit(model, augmented, self.optimizer_of(model), objective=objective, after_backward=after_backward)
        return Update(ctx.delta(model), len(samples), fitted.loss)

    def optimizer_of(self, model: Classifier) -> Optimizer:
        """A fresh optimiser: nothing of it outlives an update."""
        return sgd(model, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
