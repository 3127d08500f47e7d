"""Fed-NAD (Ma et al. 2024): honest clients keep private teachers and distil their attention into what they receive.

The teacher T_k is never sent. In each round client k trains it further on its own samples, freezes it, and trains the
received global model on the same samples towards it:

    L = CE(S(x), y) + Σ_l w_l · d(Â_S^l, Â_T^l),   Â = Σ_c F_c² flattened and divided by its L2 norm

From the official code: p = 2, Adam 1e-4, four epochs each, batch 64, a tenth of the client's samples held out, on which
the trained student is scored; the first teacher is the model that the client receives first (the code copies the common
initial model). Its 1000/2000/2000/1 weigh *mean* squared errors of maps of 56², 28², 14² and 7² positions, for it
enlarges CIFAR-10 to 224×224: `weights` are w_l / (H·W), which on the squared distance here mean the same whatever the
maps' size; `distance: mean_square` takes the code's own numbers. Deviations: images keep their size; weights are not
pretrained on ImageNet, so a rate of 1e-4 learns slowly (`init`, or `optimizer: sgd`); batch statistics are averaged.
Attackers train on all their samples, without a teacher.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.optim import Adam, Optimizer

from clients.local.sgd import Sgd
from fl_sim.attention import Distance, distillation
from fl_sim.errors import require
from fl_sim.metrics import accuracy
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, Update
from fl_sim.randomness import generator
from fl_sim.samples import Samples

TEACHER = "teacher"


def divided(samples: Samples, share: float, rng: Generator) -> tuple[Samples, Samples]:
    """Samples to train on, never none, and a share of them held out."""
    order = torch.randperm(len(samples), generator=rng)
    aside = min(round(share * len(samples)), len(samples) - 1)
    return samples[order[aside:].sort().values], samples[order[:aside].sort().values]


@dataclass(frozen=True)
class Plain(Sgd):
    """Local training without a defense, by SGD or by Adam, which has no use for `momentum`."""

    epochs: int = 4
    batch_size: int = 64
    lr: float = 1e-4
    optimizer: Literal["adam", "sgd"] = "adam"

    def optimizer_of(self, model: Classifier) -> Optimizer:
        if self.optimizer == "sgd":
            return super().optimizer_of(model)
        return Adam(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class FedNad(Plain):
    """Trains a private teacher on its own samples and distils its attention into the received model.

    The teacher takes `teacher_epochs` at rate `teacher_lr` (null: as the student). A share `held_out` of the client's
    samples is never trained on; what the client sends is scored there: `client_accs`, their mean and their minimum.
    """

    teacher_epochs: int | None = None
    teacher_lr: float | None = None
    weights: tuple[float, ...] = (0.32, 2.55, 10.2, 0.02)
    distance: Distance = "squared"
    power: float = 2.0
    held_out: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        epochs, lr = self.teacher_epochs, self.teacher_lr
        require(epochs is None or epochs >= 1, "teacher_epochs", epochs, "must be null or 1 or more")
        require(lr is None or lr > 0, "teacher_lr", lr, "must be null or above 0")
        usable = bool(self.weights) and all(weight >= 0 for weight in self.weights)
        require(usable, "weights", list(self.weights), "must be a list of one or more numbers, none below 0")
        # Below 1 the map has no finite gradient where a feature is zero, as a ReLU's often is.
        require(self.power >= 1, "power", self.power, "must be 1 or more")
        require(0 <= self.held_out < 1, "held_out", self.held_out, "must be a fraction from 0 to below 1")

    @property
    def undefended(self) -> Plain:
        """The same training without a teacher: what attackers use."""
        return Plain(**{field.name: getattr(self, field.name) for field in fields(Plain)})

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        # The same tenth in every round: what is held out must never have been trained on.
        kept, held_out = divided(samples, self.held_out, generator(ctx.client, "held out"))
        teacher = self.teacher(model, kept, ctx)
        remembered = ctx.layout.read(teacher).cpu()  # not on the device, where a thousand teachers have no room
        objective = distillation(teacher, self.weights, self.distance, self.power)
        update = self.train(model, kept, ctx, objective=objective)
        scored = accuracy(model, Samples(held_out.images, held_out.labels)) if len(held_out) else None
        return replace(update, private={TEACHER: remembered}, accuracy=scored)

    def teacher(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Classifier:
        """This client's teacher, trained for another round and frozen; the received model is left alone."""
        teacher = deepcopy(model)
        if isinstance(kept := ctx.private.get(TEACHER), Tensor):
            ctx.layout.load(teacher, kept)
        pace = replace(self.undefended, epochs=self.teacher_epochs or self.epochs, lr=self.teacher_lr or self.lr)
        # Draws of its own: the student's are those of a client without a teacher.
        pace.update(teacher, samples, replace(ctx, rng=generator(ctx.rng.initial_seed(), TEACHER)))
        return teacher.requires_grad_(False)
