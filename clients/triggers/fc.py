"""FC, feature collision ("Poison Frogs", Shafahi et al., NeurIPS 2018): target-class images with a victim's features.

    p = argmin ‖φ(p) − φ(t)‖² + β‖p − b‖²,   b: an own image of the target class, whose true label p keeps

by forward-backward splitting: p̂ = p − λ·∇‖φ(p) − φ(t)‖², then p = (p̂ + λ·β·b)/(1 + λ·β), from a watermark
b + w·(t − b) on (the paper's 30 % for models that train end to end). φ: what goes into the last layer of the received
model; λ steps have unit length relative to the gradient, since features differ in scale from model to model.
The paper's t is one test image and there is no trigger. As in ABL's use of it, t is here another class's own image
*with a patch*, so that stamping the patch is the attack: test images get the patch alone. It works where features stay
as they are and the last layer is trained anew (the paper's transfer learning); a federation that trains all layers on
8×8 digits unlearns it: its ASR may flare up in early rounds and falls to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clients.triggers.badnets import BadNets
from clients.triggers.drawing import holding
from fl_sim.backdoor import Rule
from fl_sim.distillation import with_features
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import State, Workshop
from fl_sim.samples import Samples, to_pixels


def collided(
    model: Classifier, base: Tensor, begin: Tensor, wanted: Tensor, *, beta: float, step: float, steps: int
) -> Tensor:
    """Images near `base` whose features are near `wanted` [B, D]: normalised gradient steps, each with its prox."""
    now = begin
    with torch.enable_grad():
        for _ in range(steps):
            now = now.detach().requires_grad_()
            gap = (with_features(model, now)[1] - wanted).square().sum()
            [gradient] = torch.autograd.grad(gap, now)
            length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
            ahead = now.detach() - step * gradient / length
            now = ((ahead + step * beta * base) / (1 + step * beta)).clamp(0, 1)
    return now.detach()


@dataclass(frozen=True)
class Fc:
    """Images of the target class that collide, in feature space, with stamped images of other classes."""

    rule: ClassVar[Rule] = "clean_label"
    size: int | Literal["auto"] = "auto"
    beta: float = 0.25
    watermark: float = 0.3
    step: float = 0.2
    steps: int = 20
    sources: int = 16
    held: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        BadNets(self.size)
        require(self.beta >= 0, "beta", self.beta, "must be 0 or more")
        require(0 <= self.watermark < 1, "watermark", self.watermark, "must be from 0 to below 1")
        require(self.step > 0, "step", self.step, "must be above 0")
        require(self.steps >= 0, "steps", self.steps, "must be 0 or more")
        require(self.sources >= 1, "sources", self.sources, "must be 1 or more images")

    def check(self, shape: tuple[int, int, int]) -> None:
        BadNets(self.size).check(shape)

    def __call__(self, x: Tensor) -> Tensor:
        return BadNets(self.size)(x)

    def craft(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        """Each image collides with one of the sources, drawn anew."""
        held = x.flip(0) if self.held is None else self.held.to(x)
        at = torch.randint(len(held), (len(x),), generator=workshop.rng).to(x.device)
        stamped = self(held[at])
        with torch.no_grad():
            wanted = with_features(workshop.model, stamped)[1]
        begin = torch.lerp(x, stamped, self.watermark)
        return collided(workshop.model, x, begin, wanted, beta=self.beta, step=self.step, steps=self.steps)

    def learn(self, samples: Samples, workshop: Workshop) -> State:
        """Nothing is learned: the record names the own images that poisons collide with, afresh in each round."""
        others = (samples.labels != workshop.goal.target).cpu().nonzero().flatten()
        pool = others if len(others) else torch.arange(len(samples))
        chosen = pool[torch.randperm(len(pool), generator=workshop.rng)[: self.sources]]
        return {"sources": to_pixels(samples[chosen].images).clone()}

    def recall(self, record: State) -> Fc:
        sources = record["sources"]
        assert isinstance(sources, Tensor)
        return holding(self, held=sources)
