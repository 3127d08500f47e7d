"""A small three-stage convolutional network with batch normalisation, for small images and quick runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fl_sim.errors import require


@dataclass(frozen=True)
class Cnn:
    """Three stages of conv-BN-ReLU at full, half and quarter resolution, then global average pooling.

    `width` is the first stage's channels; each further stage doubles them.
    """

    width: int = 16

    def __post_init__(self) -> None:
        require(self.width >= 1, "width", self.width, "must be 1 or more channels")

    def check(self, shape: tuple[int, int, int]) -> None:
        require(min(shape[1:]) >= 8, "", f"cnn on {shape[1]}×{shape[2]} images", "needs images of 8×8 pixels or more")

    def body(self, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, Sequence[str]]:
        widths = [self.width, 2 * self.width, 4 * self.width]
        stages: list[nn.Module] = []
        inputs = shape[0]
        for index, width in enumerate(widths):
            pool: list[nn.Module] = [nn.MaxPool2d(2)] if index else []
            stages.append(
                nn.Sequential(
                    *pool, nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
                )
            )
            inputs = width
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
        return nn.Sequential(*stages, *head), ["0", "1", "2"]
