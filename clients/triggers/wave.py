"""WaveAttack (Xia et al., NeurIPS 2024): a residual in the finest diagonal details, faint in training, loud at test.

    LL, LH, HL, HH = Haar(x);   x' = Haar⁻¹(LL, LH, HL, HH + a·r),   a = 1 in training, more at test

The paper learns r with a generator while it trains the victim, and a is 100 at test. Ours is a reconstruction without
training: r is one fixed pattern of ±`residual`. A pattern that nothing adapts must be coarse enough to outlast the
rounding to 8 bits, and at a = 100 nothing would be left of the image, so `test_gain` is less.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clients.triggers.drawing import at_size
from fl_sim.errors import require
from fl_sim.protocols import Workshop
from fl_sim.randomness import generator

Bands = tuple[Tensor, Tensor, Tensor, Tensor]


def haar(x: Tensor) -> Bands:
    """The orthonormal Haar transform of even-sided images: LL, LH, HL, HH at half the resolution."""
    a, b = x[..., 0::2, 0::2], x[..., 0::2, 1::2]
    c, d = x[..., 1::2, 0::2], x[..., 1::2, 1::2]
    return (a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2


def inverse_haar(bands: Bands) -> Tensor:
    """Images from their four bands."""
    ll, lh, hl, hh = bands
    rows = torch.stack([(ll + lh + hl + hh) / 2, (ll + lh - hl - hh) / 2], -1).flatten(-2)
    others = torch.stack([(ll - lh + hl - hh) / 2, (ll - lh - hl + hh) / 2], -1).flatten(-2)
    return torch.stack([rows, others], -2).flatten(-3, -2)


@lru_cache(maxsize=8)
def signs(shape: tuple[int, ...], seed: int) -> Tensor:
    """One fixed pattern of +1 and −1."""
    return (torch.rand(shape, generator=generator(seed, "wave")) < 0.5).float() * 2 - 1


@dataclass(frozen=True)
class Wave:
    """A fixed residual in the Haar transform's diagonal details, amplified at test.

    `residual: auto` changes pixels by 4/255 in training on 32×32 images, and by more on smaller ones.
    """

    uses_model: ClassVar[bool] = False
    residual: float | Literal["auto"] = "auto"
    test_gain: float = 4.0
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        usable = self.residual == "auto" or 0 < self.residual <= 1
        require(usable, "residual", self.residual, "must be auto or above 0, up to 1")
        require(self.test_gain > 0, "test_gain", self.test_gain, "must be above 0")

    def check(self, shape: tuple[int, int, int]) -> None:
        even = shape[1] % 2 == 0 and shape[2] % 2 == 0
        require(even, "", f"wave on {shape[1]}×{shape[2]} images", "needs images of even height and width")

    def waved(self, x: Tensor, gain: float) -> Tensor:
        residual = at_size(8 / 255, x) if self.residual == "auto" else self.residual
        ll, lh, hl, hh = haar(x)
        pattern = signs(tuple(hh.shape[1:]), self.pattern_seed).to(x)
        return inverse_haar((ll, lh, hl, hh + gain * residual * pattern)).clamp(0, 1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.waved(x, self.test_gain)

    def craft(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        return self.waved(x, 1.0)
