"""Training on a small clean set: what fine-tuning, its variants and a distillation's teacher and student share."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass

from torch import Generator

from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext
from fl_sim.samples import Samples
from fl_sim.training import Objective, cross_entropy, decayed, sgd


@dataclass(frozen=True)
class Tuning:
    """The hyperparameters of SGD on a clean set.

    The learning rate is multiplied by `lr_decay` after each `lr_decay_epochs` of the `epochs`, at most `lr_decays`
    times (None: no limit). `min_steps` stretches that schedule as a whole: on a small clean set the paper's epochs
    alone would be a handful of steps.
    """

    epochs: int = 10
    min_steps: int = 400
    batch_size: int = 64
    lr: float = 0.1
    lr_decay: float = 0.1
    lr_decay_epochs: int = 2
    lr_decays: int | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    augment: bool = True

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", self.epochs, "must be 1 or more")
        require(self.min_steps >= 0, "min_steps", self.min_steps, "must be 0 or more")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "must be 2 or more")
        require(self.lr > 0, "lr", self.lr, "must be above 0")
        require(0 < self.lr_decay <= 1, "lr_decay", self.lr_decay, "must be above 0 and at most 1")
        require(self.lr_decay_epochs >= 1, "lr_decay_epochs", self.lr_decay_epochs, "must be 1 or more")
        require(self.lr_decays is None or self.lr_decays >= 0, "lr_decays", self.lr_decays, "must be null or 0 or more")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "must be from 0 to below 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")

    def tuned(
        self,
        model: Classifier,
        clean: Samples,
        ctx: ServerContext,
        rng: Generator,
        *,
        objective: Objective = cross_entropy,
        epochs: int | None = None,
    ) -> Classifier:
        """A trained copy of the model; the model itself is left alone."""
        copy = deepcopy(model)
        epochs = self.epochs if epochs is None else epochs
        ctx.fit(
            copy,
            clean.then(ctx.augment) if self.augment else clean,
            sgd(copy, self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov),
            epochs=epochs,
            batch_size=self.batch_size,
            rng=rng,
            objective=objective,
            min_steps=self.min_steps,
            schedule=decayed(
                self.lr_decay, self.lr_decay_epochs / epochs, math.inf if self.lr_decays is None else self.lr_decays
            ),
        )
        return copy
