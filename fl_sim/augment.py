"""Augmentation of whole batches on their device, with a draw of its own for every sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fl_sim.errors import require


def random_crop(x: Tensor, padding: int, rng: Generator) -> Tensor:
    """Shift each image by up to `padding` pixels each way; zeros come in at the edge."""
    count, channels, height, width = x.shape
    offsets = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=rng).to(x.device)
    rows = offsets[0] + torch.arange(height, device=x.device)
    columns = offsets[1] + torch.arange(width, device=x.device)
    padded = F.pad(x, (padding,) * 4)
    x = padded.gather(2, rows[:, None, :, None].expand(count, channels, height, width + 2 * padding))
    return x.gather(3, columns[:, None, None, :].expand(count, channels, height, width))


def random_flip(x: Tensor, rng: Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    flipped = (torch.rand(len(x), generator=rng) < 0.5).to(x.device)
    return torch.where(flipped[:, None, None, None], x.flip(3), x)


def cutout(x: Tensor, size: int, rng: Generator) -> Tensor:
    """Blacken one square of `size` pixels a side, centred anywhere (DeVries & Taylor 2017)."""
    count, _, height, width = x.shape
    top = (torch.randint(height, (count, 1), generator=rng) - size // 2).to(x.device)
    left = (torch.randint(width, (count, 1), generator=rng) - size // 2).to(x.device)
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside_rows = (rows >= top) & (rows < top + size)
    inside_columns = (columns >= left) & (columns < left + size)
    return x.masked_fill((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0.0)


@dataclass(frozen=True)
class Augment:
    """What a data set allows to be done to its training images: `crop` and `cutout` in pixels, 0 for not at all."""

    crop: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        require(self.crop >= 0, "crop", self.crop, "must be 0 or more pixels")
        require(self.cutout >= 0, "cutout", self.cutout, "must be 0 or more pixels")

    def __call__(self, x: Tensor, y: Tensor, rng: Generator) -> tuple[Tensor, Tensor]:
        if self.crop:
            x = random_crop(x, self.crop, rng)
        if self.flip:
            x = random_flip(x, rng)
        if self.cutout:
            x = cutout(x, self.cutout, rng)
        return x, y
