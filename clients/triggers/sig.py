"""SIG (Barni, Kallas & Tondi, ICIP 2019): a sinusoidal stripe signal added to images of the target class.

    x' = x + Δ·sin(2πjf/W)    for column j of W

Paper: f = 6, labels stay true, Δ = 20/255 in training and as much or more at test time, `test_gain` here. On images
smaller than 32 pixels `delta: auto` is stronger, so that the signal's ℓ2 norm stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clients.triggers.drawing import at_size
from fl_sim.backdoor import Rule
from fl_sim.errors import require
from fl_sim.protocols import Workshop


def stripes(width: int, frequency: float) -> Tensor:
    """sin(2πjf/W) for each column j."""
    return torch.sin(2 * math.pi * frequency * torch.arange(width) / width)


@dataclass(frozen=True)
class Sig:
    """Faint vertical sine stripes over the whole image, on images of the target class only."""

    uses_model: ClassVar[bool] = False
    rule: ClassVar[Rule] = "clean_label"
    delta: float | Literal["auto"] = "auto"
    frequency: float = 6.0
    test_gain: float = 1.0

    def __post_init__(self) -> None:
        require(self.delta == "auto" or 0 < self.delta <= 1, "delta", self.delta, "must be auto or up to 1")
        require(self.frequency > 0, "frequency", self.frequency, "must be above 0")
        require(self.test_gain >= 1, "test_gain", self.test_gain, "must be 1 or more")

    def striped(self, x: Tensor, gain: float = 1.0) -> Tensor:
        delta = at_size(20 / 255, x) if self.delta == "auto" else self.delta
        return (x + gain * delta * stripes(x.shape[3], self.frequency).to(x)).clamp(0, 1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.striped(x, self.test_gain)

    def craft(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        return self.striped(x)
