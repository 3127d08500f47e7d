"""DBA, distributed backdoor attack (Xie et al., ICLR 2020): each attacker stamps its part of one pattern.

The pattern is four white bars in a corner, two rows of two; attacker i stamps bar i mod 4, the scorer stamps all four.
Official code on CIFAR-10: bars of 1×6 pixels, gaps of 3, at the top left. Fewer than four attackers share the bars out,
so that the whole is always covered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from clients.triggers.drawing import scaled
from fl_sim.errors import require
from fl_sim.protocols import Workshop

BARS = 4


def parts_of(rank: int, attackers: int) -> list[int]:
    """Which bars an attacker stamps: one, or several where there are fewer attackers than bars."""
    sharing = min(attackers, BARS)
    return [bar for bar in range(BARS) if bar % sharing == rank % sharing]


@dataclass(frozen=True)
class Dba:
    """Four white bars, of which each malicious client stamps its own; together they are the trigger.

    `auto`: bars of 6 pixels and gaps of 3 on 32×32 images, scaled with the image, bars at least 2 long.
    """

    uses_model: ClassVar[bool] = False
    length: int | Literal["auto"] = "auto"
    gap: int | Literal["auto"] = "auto"
    shift: int = 0

    def __post_init__(self) -> None:
        require(self.length == "auto" or self.length >= 1, "length", self.length, "must be auto or 1 or more pixels")
        require(self.gap == "auto" or self.gap >= 0, "gap", self.gap, "must be auto or 0 or more pixels")
        require(self.shift >= 0, "shift", self.shift, "must be 0 or more pixels")

    def check(self, shape: tuple[int, int, int]) -> None:
        length, gap = self.sizes(min(shape[1:]))
        needed, image = self.shift + 2 * length + gap, min(shape[1:])
        allowed = f"the bars need {needed} of {image} pixels (shift + 2·length + gap)"
        require(needed <= image, "length", self.length, allowed)

    def sizes(self, image: int) -> tuple[int, int]:
        """A bar's length and the gap, on images of this many pixels."""
        length = scaled(6, image, 2) if self.length == "auto" else self.length
        return length, scaled(3, image) if self.gap == "auto" else self.gap

    def stamped(self, x: Tensor, bars: list[int]) -> Tensor:
        length, gap = self.sizes(min(x.shape[2:]))
        x = x.clone()
        for bar in bars:
            row = self.shift + (bar // 2) * (gap + 1)
            column = self.shift + (bar % 2) * (length + gap)
            x[:, :, row, column : column + length] = 1.0
        return x

    def __call__(self, x: Tensor) -> Tensor:
        return self.stamped(x, list(range(BARS)))

    def craft(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        return self.stamped(x, parts_of(workshop.rank, workshop.attackers))
