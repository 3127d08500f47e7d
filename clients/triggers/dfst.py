"""DFST (Cheng et al., AAAI 2021): the trigger is a style, and the model is kept from knowing it by simple features.

    x' = clip(x·(1 + s·tanh a(x)) + s·tanh b(x)),   a, b: smooth light maps that a generator paints
    min over the generator: CE(f(x'), target) + γ·‖channel means of x' − the style's‖² + κ·‖∇x' − ∇x‖²

Reconstruction: the paper transfers the style of sunsets by a CycleGAN and finds what to detoxify by exciting
compromised neurons. Here the style is a smooth change of light towards warm, bright colours, and its detoxification is
fixed: images that got the style's mean brightness and colour alone keep their labels, so that this is not enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.triggers.generator import Painted, Painter
from clients.triggers.lira import wanted_entropy
from fl_sim.errors import require
from fl_sim.protocols import Workshop
from fl_sim.samples import Samples
from fl_sim.training import Objective

SUNSET = (0.75, 0.5, 0.35)
"""The style's channel means; grey images strive for their mean."""
CELLS = 4
"""Light varies over a grid of so many cells a side."""


def warmth(x: Tensor) -> Tensor:
    """The style's mean of each channel [C]."""
    return x.new_tensor(SUNSET if x.shape[1] == 3 else (sum(SUNSET) / 3,) * x.shape[1])


def smooth(raw: Tensor) -> Tensor:
    """Maps with nothing finer than a coarse grid left in them."""
    coarse = F.adaptive_avg_pool2d(raw, CELLS)
    return F.interpolate(coarse, raw.shape[2:], mode="bilinear", align_corners=True)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and across."""
    return x[:, :, 1:] - x[:, :, :-1], x[..., 1:] - x[..., :-1]


@dataclass(frozen=True)
class Dfst(Painted):
    """A warm light that a generator paints over the whole image; cover images show that mere brightness is not it."""

    strength: float = 0.3
    style: float = 10.0
    content: float = 1.0
    cover: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.strength <= 1, "strength", self.strength, "must be above 0 and at most 1")
        require(self.style >= 0, "style", self.style, "must be 0 or more")
        require(self.content >= 0, "content", self.content, "must be 0 or more")
        require(self.cover >= 0, "cover", self.cover, "must be 0 or more")

    def outputs(self, channels: int) -> int:
        return 2 * channels

    def painted(self, painter: Painter, x: Tensor) -> Tensor:
        gain, light = smooth(painter(x)).chunk(2, 1)
        light = light + 4 * (warmth(x) - 0.5)[:, None, None]  # begins with the style's tint
        return (x * (1 + self.strength * gain.tanh()) + self.strength * light.tanh()).clamp(0, 1)

    def objective(self, samples: Samples, workshop: Workshop) -> Objective:
        def loss(painter: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            assert isinstance(painter, Painter)
            styled = self.painted(painter, x)
            away = (styled.mean((2, 3)) - warmth(x)).square().mean()
            bent = torch.stack([F.mse_loss(a, b) for a, b in zip(edges(styled), edges(x), strict=True)]).sum()
            return wanted_entropy(styled, y, workshop) + self.style * away + self.content * bent

        return loss

    @torch.no_grad()
    def disguise(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        """Images shifted by what the style changes in the mean, the same for every pixel."""
        return x + (self(x) - x).mean((2, 3), keepdim=True)
