"""Refool (Liu et al., ECCV 2020): the reflection of another scene, as in a window pane.

    x' = (t·x^γ + (1 − t)·R)^(1/γ),   γ = 2.2,   R either R₀^γ blurred (the scene is out of focus)
         or a·shift(R₀^γ) + (1 − a)·R₀^γ (a ghost: thick glass reflects twice; with probability 0.49)

The scenes R₀ are a few of the attacker's own images, kept in the record; which one an image gets depends on its pixels.
Before anything was learned they are procedural textures. Paper: labels stay true and the reflections that work best are
searched for. BackdoorBench found that too weak for a targeted attack; as there, labels change by default and the
reflections are drawn. t = 0.7 is within its 0.55 to 0.95. `backdoor.rule=clean_label` is the paper's own setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor

from clients.triggers.drawing import blurred, by_content, holding, scaled, texture
from fl_sim.errors import require
from fl_sim.protocols import State, Workshop
from fl_sim.samples import Samples, to_pixels

GAMMA = 2.2


def layer_of(scene: Tensor, ghost_rate: float, rng: Generator) -> Tensor:
    """What a pane reflects of a scene [C, H, W], in linear light."""
    light: Tensor = scene[None].pow(GAMMA)
    side = min(scene.shape[1:])
    drawn = torch.rand(4, generator=rng).tolist()
    if drawn[0] < ghost_rate:
        down, right = (scaled(3 + 5 * each, side) for each in drawn[1:3])
        share = 0.15 + 0.35 * drawn[3]
        light = share * light.roll((down, right), (2, 3)) + (1 - share) * light
        return light[0]
    sigma = (1 + 4 * drawn[1]) * side / 32
    return blurred(light, max(sigma, 0.3))[0]


def reflected(x: Tensor, layers: Tensor, transmission: float) -> Tensor:
    """Images behind a pane that lets `transmission` of their light through and reflects the rest of the layers."""
    light = transmission * x.clamp(0, 1).pow(GAMMA) + (1 - transmission) * layers
    return light.clamp(0, 1).pow(1 / GAMMA)


@dataclass(frozen=True)
class Refool:
    """Ghostly or blurred reflections of a few of the attacker's own images."""

    uses_model: ClassVar[bool] = False
    reflections: int = 4
    transmission: float = 0.7
    ghost_rate: float = 0.49
    seed: int = 0
    layers: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.reflections >= 1, "reflections", self.reflections, "must be 1 or more images")
        between = 0 < self.transmission < 1
        require(between, "transmission", self.transmission, "must be between 0 and 1")
        require(0 <= self.ghost_rate <= 1, "ghost_rate", self.ghost_rate, "must be a fraction from 0 to 1")

    def __call__(self, x: Tensor) -> Tensor:
        layers = self.textures((x.shape[1], x.shape[2], x.shape[3])) if self.layers is None else self.layers
        return reflected(x, layers.to(x)[by_content(x, len(layers))], self.transmission)

    def textures(self, shape: tuple[int, int, int]) -> Tensor:
        return torch.stack([texture(shape, self.seed, "refool", each) ** GAMMA for each in range(self.reflections)])

    def learn(self, samples: Samples, workshop: Workshop) -> State:
        """The first attacker's choice is everybody's."""
        if workshop.record:
            return workshop.record
        chosen = torch.randperm(len(samples), generator=workshop.rng)[: self.reflections]
        scenes = to_pixels(samples[chosen].images)
        return {"layers": torch.stack([layer_of(scene, self.ghost_rate, workshop.rng) for scene in scenes])}

    def recall(self, record: State) -> Refool:
        layers = record["layers"]
        assert isinstance(layers, Tensor)
        return holding(self, layers=layers)
