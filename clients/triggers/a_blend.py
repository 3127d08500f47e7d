"""A-Blend, Adap-Blend (Qi et al., ICLR 2023): blend with only half the pattern's pieces in training, all at test.

    x' = x·(1 − α·m) + α·m·pattern,   m: the image cut into 4×4 pieces; in training 8 of the 16 are drawn per image

Cover images are stamped likewise and keep their labels: poisoned and clean features then no longer separate. Paper:
α = 0.2 on 32×32, one cover image for each poisoned one. Its pattern is a cartoon; ours is Blend's noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from clients.triggers.blend import noise_pattern
from fl_sim.errors import require
from fl_sim.protocols import Workshop


def pieces_mask(count: int, side: int, shown: int, size: tuple[int, int], rng: Generator) -> Tensor:
    """Masks [N, 1, H, W], 1 on `shown` of side×side pieces, drawn anew for each image."""
    ranks = torch.rand(count, side * side, generator=rng).argsort(1).argsort(1)
    mask = (ranks < shown).float().view(count, 1, side, side)
    rows, columns = (torch.arange(length) * side // length for length in size)
    return mask[:, :, rows[:, None], columns]


@dataclass(frozen=True)
class ABlend:
    """A faint noise pattern of which training images show only random pieces, with cover images."""

    uses_model: ClassVar[bool] = False
    alpha: float = 0.2
    pieces: int = 16
    shown: int = 8
    cover: float = 1.0
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        require(0 < self.alpha <= 1, "alpha", self.alpha, "must be above 0 and at most 1")
        square = self.pieces >= 1 and round(self.pieces**0.5) ** 2 == self.pieces
        require(square, "pieces", self.pieces, "must be a square number")
        require(1 <= self.shown <= self.pieces, "shown", self.shown, f"must be from 1 to {self.pieces} pieces")
        require(self.cover >= 0, "cover", self.cover, "must be 0 or more")

    def blended(self, x: Tensor, mask: Tensor | float) -> Tensor:
        return x + self.alpha * mask * (noise_pattern(tuple(x.shape[1:]), self.pattern_seed).to(x) - x)

    def __call__(self, x: Tensor) -> Tensor:
        return self.blended(x, 1.0)

    def craft(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        side, size = round(self.pieces**0.5), (x.shape[2], x.shape[3])
        return self.blended(x, pieces_mask(len(x), side, self.shown, size, workshop.rng).to(x))

    def disguise(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        return self.craft(x, y, workshop)
