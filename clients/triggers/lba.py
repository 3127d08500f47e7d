"""LBA, latent backdoor (Yao et al., CCS 2019): a patch whose features look like the target class's.

    min over the pattern p: ‖φ(x stamped) − φ̄‖² / ‖φ̄‖²,   φ̄: mean features of the target class, φ: into the last layer

The paper aligns in a chosen hidden layer and then trains the teacher with the same distance as a second loss; here the
model is trained by whatever attack is in use, so it is the trigger alone that aligns. Who has no image of the target
class, or an all_to_all rule, descends the cross-entropy instead. The patch is a square in the corner, as BadNets'.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from clients.triggers.badnets import BadNets
from clients.triggers.drawing import holding
from clients.triggers.lira import wanted_entropy
from clients.triggers.pattern import descended, mixed, opacity
from fl_sim.distillation import with_features
from fl_sim.errors import require
from fl_sim.protocols import State, Workshop
from fl_sim.randomness import generator
from fl_sim.samples import Samples, to_pixels


@dataclass(frozen=True)
class Lba:
    """A patch that the received model's features confuse with the target class."""

    size: int | Literal["auto"] = "auto"
    epochs: int = 1
    batch_size: int = 32
    step: float = 0.1
    seed: int = 0
    pattern: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        BadNets(self.size)
        require(self.epochs >= 1, "epochs", self.epochs, "must be 1 or more")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "must be 2 or more")
        require(self.step > 0, "step", self.step, "must be above 0")

    def check(self, shape: tuple[int, int, int]) -> None:
        BadNets(self.size).check(shape)

    def place(self, x: Tensor) -> Tensor:
        """The patch's pixels, as a mask [1, C, H, W]."""
        return opacity(BadNets(self.size, "white"), x)

    def shown(self, x: Tensor) -> Tensor:
        """The pattern as learned so far, at first noise."""
        if self.pattern is not None:
            return self.pattern.to(x)
        return torch.rand(1, *x.shape[1:], generator=generator(self.seed, "lba")).to(x)

    def __call__(self, x: Tensor) -> Tensor:
        return mixed(x, self.shown(x), self.place(x))

    def learn(self, samples: Samples, workshop: Workshop) -> State:
        known = self.recall(workshop.record) if workshop.record else self
        x = to_pixels(samples.images[:1])
        place, model = self.place(x), workshop.model
        own = samples.images[samples.labels == workshop.goal.target][: self.batch_size]
        aligning = len(own) > 0 and workshop.goal.rule != "all_to_all"
        with torch.no_grad():
            centre = with_features(model, to_pixels(own))[1].mean(0) if aligning else torch.ones(())

        def loss(pattern: Tensor, x: Tensor, y: Tensor) -> Tensor:
            stamped = mixed(x, pattern, place)
            if not aligning:
                return wanted_entropy(stamped, y, workshop)
            apart = with_features(model, stamped)[1] - centre
            return apart.square().sum(1).mean() / centre.square().sum().clamp_min(1e-6)

        def step(pattern: Tensor, gradient: Tensor) -> Tensor:
            return (pattern - self.step * gradient.sign()).clamp(0, 1)

        begin = known.shown(x)
        found = descended(begin, samples, workshop, loss, step, epochs=self.epochs, batch_size=self.batch_size)
        return {"pattern": found}

    def recall(self, record: State) -> Lba:
        pattern = record["pattern"]
        assert isinstance(pattern, Tensor)
        return holding(self, pattern=pattern)
