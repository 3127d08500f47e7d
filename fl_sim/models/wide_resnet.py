"""Wide residual networks (Zagoruyko & Komodakis, BMVC 2016), as NAD, ABL and ARGD use them on CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fl_sim.errors import require
from fl_sim.models.preact_resnet import preactivation_network


@dataclass(frozen=True)
class WideResNet:
    """A wide residual network of three groups, tapped at each group's output, before the last BN-ReLU."""

    depth: int = 16
    widen: int = 1

    def __post_init__(self) -> None:
        require(self.depth >= 10 and (self.depth - 4) % 6 == 0, "depth", self.depth, "must be 6n+4: 10, 16, 22, 28, 40")
        require(self.widen >= 1, "widen", self.widen, "must be 1 or more")

    def body(self, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, Sequence[str]]:
        widths = (16 * self.widen, 32 * self.widen, 64 * self.widen)
        return preactivation_network(shape[0], 16, widths, (self.depth - 4) // 6, classes)
