"""Training on a clean set while the learning rate falls along half a cosine (Loshchilov & Hutter, ICLR 2017)."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass

from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext
from fl_sim.samples import Samples, batch_sizes
from fl_sim.training import Objective, cross_entropy, sgd


def cosine(progress: float) -> float:
    """The factor on the learning rate: 1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Annealed:
    """The hyperparameters of SGD with a cosine schedule, which `min_steps` stretches as a whole."""

    epochs: int = 100
    min_steps: int = 1000
    batch_size: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = True

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", self.epochs, "must be 1 or more")
        require(self.min_steps >= 0, "min_steps", self.min_steps, "must be 0 or more")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "must be 2 or more")
        require(self.lr > 0, "lr", self.lr, "must be above 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "must be from 0 to below 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")

    def steps(self, samples: Samples) -> int:
        """How many steps a training on these samples takes."""
        return max(self.epochs * len(batch_sizes(len(samples), self.batch_size)), self.min_steps)

    def annealed(
        self, model: Classifier, clean: Samples, ctx: ServerContext, objective: Objective = cross_entropy
    ) -> Classifier:
        """A trained copy of the model; the model itself is left alone."""
        copy = deepcopy(model)
        ctx.fit(
            copy,
            clean.then(ctx.augment) if self.augment else clean,
            sgd(copy, self.lr, momentum=self.momentum, weight_decay=self.weight_decay),
            epochs=self.epochs,
            batch_size=self.batch_size,
            rng=ctx.rng,
            objective=objective,
            min_steps=self.min_steps,
            schedule=cosine,
        )
        return copy
