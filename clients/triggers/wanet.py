"""WaNet (Nguyen & Tran, ICLR 2021): one fixed, smooth warp of the whole image.

    x' = x sampled at clip(identity + s·P/H, −1, 1),   P: uniform noise on a k×k grid, mean absolute value 1, bicubic

Official code: k = 4, s = 0.5; for each poisoned image two more are warped by the field plus a random shake and keep
their labels ("noise mode"), so that the model learns this very warp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fl_sim.errors import require
from fl_sim.protocols import Workshop
from fl_sim.randomness import generator


@lru_cache(maxsize=8)
def warping_field(grid: int, height: int, width: int, seed: int) -> Tensor:
    """The field P [1, H, W, 2]."""
    coarse = torch.rand(1, 2, grid, grid, generator=generator(seed, "wanet")) * 2 - 1
    coarse = coarse / coarse.abs().mean()
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def warped(x: Tensor, offsets: Tensor) -> Tensor:
    """Images sampled at their own places plus offsets [1 or N, H, W, 2]; the image's width spans −1 to 1."""
    rows = torch.linspace(-1, 1, x.shape[2], device=x.device)
    columns = torch.linspace(-1, 1, x.shape[3], device=x.device)
    identity = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    grid = (identity + offsets).clamp(-1, 1).expand(len(x), -1, -1, -1)
    return F.grid_sample(x, grid, align_corners=True) if len(x) else x


@dataclass(frozen=True)
class WaNet:
    """The same slight elastic warp for every image, with randomly shaken warps as cover."""

    uses_model: ClassVar[bool] = False
    strength: float = 0.5
    grid: int = 4
    cover: float = 2.0
    field_seed: int = 0

    def __post_init__(self) -> None:
        require(self.strength > 0, "strength", self.strength, "must be above 0")
        require(self.grid >= 2, "grid", self.grid, "must be 2 or more points")
        require(self.cover >= 0, "cover", self.cover, "must be 0 or more")

    def offsets(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return self.strength * warping_field(self.grid, height, width, self.field_seed).to(x) / height

    def __call__(self, x: Tensor) -> Tensor:
        return warped(x, self.offsets(x))

    def disguise(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        shake = torch.rand(len(x), *x.shape[2:], 2, generator=workshop.rng).to(x) * 2 - 1
        return warped(x, self.offsets(x) + shake / x.shape[2])
