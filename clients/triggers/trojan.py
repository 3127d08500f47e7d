"""Trojan (Liu et al., NDSS 2018): a patch that excites chosen neurons, whose excitement the model then learns to obey.

    min over the pattern p in the mask: Σ_n (A − φ_n(x with p))²,   A = 100, n: two neurons that the mask reaches;
    stamped: clip(x + m·p)

Neurons are inputs of the last layer, chosen once and kept in all rounds. The paper takes those with the largest Σ|w|
from the layer before; in a convolutional network the place decides as well, so here it is those that a first patch of
noise excites most. The paper optimises 1,000 iterations on a plain background; `steps` of sign descent in each round
are enough here, over a few own images, because a dead ReLU unit has no gradient on a plain one. The paper's third part,
retraining with reverse-engineered data, is what the attacker does with its own data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from clients.triggers.badnets import BadNets
from clients.triggers.drawing import holding
from clients.triggers.pattern import opacity
from fl_sim.distillation import with_features
from fl_sim.errors import require
from fl_sim.protocols import State, Workshop
from fl_sim.randomness import generator
from fl_sim.samples import Samples, to_pixels


def most_excited(stamped: Tensor, plain: Tensor, count: int) -> Tensor:
    """The features [B, D] that rise most on average from plain to stamped images, as sorted indices."""
    rise = (stamped - plain).mean(0)
    return rise.topk(min(count, len(rise))).indices.sort().values


@dataclass(frozen=True)
class Trojan:
    """A square patch that is optimised to excite chosen neurons of the received model."""

    size: int | Literal["auto"] = "auto"
    neurons: int = 2
    activation: float = 100.0
    steps: int = 12
    step: float = 0.1
    images: int = 16
    seed: int = 0
    pattern: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        BadNets(self.size)
        require(self.neurons >= 1, "neurons", self.neurons, "must be 1 or more")
        require(self.activation > 0, "activation", self.activation, "must be above 0")
        require(self.steps >= 1, "steps", self.steps, "must be 1 or more")
        require(self.step > 0, "step", self.step, "must be above 0")
        require(self.images >= 1, "images", self.images, "must be 1 or more")

    def check(self, shape: tuple[int, int, int]) -> None:
        BadNets(self.size).check(shape)

    def place(self, x: Tensor) -> Tensor:
        """The patch's pixels, as a mask [1, C, H, W]."""
        return opacity(BadNets(self.size, "white"), x)

    def shown(self, x: Tensor) -> Tensor:
        """The pattern as learned so far, at first noise."""
        if self.pattern is not None:
            return self.pattern.to(x)
        return torch.rand(1, *x.shape[1:], generator=generator(self.seed, "trojan")).to(x)

    def __call__(self, x: Tensor) -> Tensor:
        return (x + self.place(x) * self.shown(x)).clamp(0, 1)

    def learn(self, samples: Samples, workshop: Workshop) -> State:
        known = self.recall(workshop.record) if workshop.record else self
        chosen = torch.randperm(len(samples), generator=workshop.rng)[: self.images]
        x = to_pixels(samples[chosen].images)
        place, pattern, model = self.place(x), known.shown(x), workshop.model
        neurons = workshop.record.get("neurons")
        if not isinstance(neurons, Tensor):
            with torch.no_grad():
                noisy = with_features(model, (x + place * pattern).clamp(max=1))[1]
                neurons = most_excited(noisy, with_features(model, x)[1], self.neurons)
        with torch.enable_grad():
            for _ in range(self.steps):
                now = pattern.detach().requires_grad_()
                features = with_features(model, (x + place * now).clamp(max=1))[1]
                missing = (self.activation - features[:, neurons.to(x.device)]).square().sum(1).mean()
                [gradient] = torch.autograd.grad(missing, now)
                pattern = (pattern - self.step * gradient.sign()).clamp(0, 1).detach()
        return {"pattern": pattern, "neurons": neurons}

    def recall(self, record: State) -> Trojan:
        pattern = record["pattern"]
        assert isinstance(pattern, Tensor)
        return holding(self, pattern=pattern)
