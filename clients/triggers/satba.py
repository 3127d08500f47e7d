"""SATBA (Zhou et al. 2023): invisible noise, for each image where the model's spatial attention is.

    T(x) = clip(x + ε·A(x)·tanh(G(x))),   A(x) in [0, 1]
    min over A, G: CE(f(T(x)), target) + β·‖Â(x) − attention of the received model‖² + γ·‖T(x) − x‖²

Reconstruction: the paper makes the pattern from a trained model's spatial attention and hides it with a U-Net. The
scorer has no such model, so here one U-Net paints both maps, A being distilled from the received model's attention
(Σ_c F_c² of its middle tap). `auto` ε is 0.1 on 32×32 images, more on smaller ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.triggers.drawing import at_size
from clients.triggers.generator import Painted, Painter
from clients.triggers.lira import wanted_entropy
from fl_sim.attention import attention_map, map_distance
from fl_sim.errors import require
from fl_sim.protocols import Workshop
from fl_sim.samples import Samples
from fl_sim.training import Objective


def spatial_attention(raw: Tensor) -> Tensor:
    """Maps [B, 1, H, W] -> attention in (0, 1] whose highest place is 1."""
    gate = torch.sigmoid(raw)
    return gate / gate.amax((2, 3), keepdim=True)


@dataclass(frozen=True)
class Satba(Painted):
    """Faint noise that a U-Net paints where the model looks, learned from the received model's attention."""

    epsilon: float | Literal["auto"] = "auto"
    attention: float = 1.0
    invisibility: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        usable = self.epsilon == "auto" or 0 < self.epsilon <= 1
        require(usable, "epsilon", self.epsilon, "must be auto or above 0, up to 1")
        require(self.attention >= 0, "attention", self.attention, "must be 0 or more")
        require(self.invisibility >= 0, "invisibility", self.invisibility, "must be 0 or more")

    def outputs(self, channels: int) -> int:
        return channels + 1

    def stamped(self, x: Tensor, raw: Tensor) -> Tensor:
        """The images with what the painter's raw maps say."""
        bound = at_size(0.1, x) if self.epsilon == "auto" else self.epsilon
        return (x + bound * spatial_attention(raw[:, -1:]) * torch.tanh(raw[:, :-1])).clamp(0, 1)

    def painted(self, painter: Painter, x: Tensor) -> Tensor:
        return self.stamped(x, painter(x))

    def objective(self, samples: Samples, workshop: Workshop) -> Objective:
        def loss(painter: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            raw = painter(x)
            stamped = self.stamped(x, raw)
            with torch.no_grad():
                _, taps = workshop.model.with_taps(x)
                looked = attention_map(middle := taps[len(taps) // 2])
            own = F.adaptive_avg_pool2d(spatial_attention(raw[:, -1:]), (middle.shape[2], middle.shape[3]))
            aligned = map_distance(attention_map(own, power=1.0), looked, "squared")
            visible = (stamped - x).square().mean()
            return wanted_entropy(stamped, y, workshop) + self.attention * aligned + self.invisibility * visible

        return loss
