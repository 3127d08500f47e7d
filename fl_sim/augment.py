"""Augmentation of whole batches on their device, with a draw of its own for every sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fl_sim.errors import require

# Draws stand apart from what is done with them: clients that train together draw alone and are augmented at once.


def crop_offsets(count: int, padding: int, rng: Generator) -> Tensor:
    """How far each of the images moves down and right, counted from the far corner [count, 2]."""
    return torch.randint(0, 2 * padding + 1, (2, count, 1), generator=rng)[..., 0].T


def shifted(x: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Each image moved by its offsets; zeros come in at the edge."""
    count, channels, height, width = x.shape
    rows = offsets[:, :1] + torch.arange(height, device=x.device)
    columns = offsets[:, 1:] + torch.arange(width, device=x.device)
    padded = F.pad(x, (padding,) * 4)
    x = padded.gather(2, rows[:, None, :, None].expand(count, channels, height, width + 2 * padding))
    return x.gather(3, columns[:, None, None, :].expand(count, channels, height, width))


def random_crop(x: Tensor, padding: int, rng: Generator) -> Tensor:
    """Shift each image by up to `padding` pixels each way; zeros come in at the edge."""
    return shifted(x, crop_offsets(len(x), padding, rng).to(x.device, non_blocking=True), padding)


def coins(count: int, rng: Generator) -> Tensor:
    """True or false for each image, evenly."""
    return torch.rand(count, generator=rng) < 0.5


def mirrored(x: Tensor, flipped: Tensor) -> Tensor:
    """The chosen images left to right."""
    return torch.where(flipped[:, None, None, None], x.flip(3), x)


def random_flip(x: Tensor, rng: Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    return mirrored(x, coins(len(x), rng).to(x.device, non_blocking=True))


def corners(count: int, side: tuple[int, int], size: int, rng: Generator) -> Tensor:
    """The top left corner of each image's square [count, 2]; its centre lies anywhere in the image."""
    top = torch.randint(side[0], (count, 1), generator=rng)
    return torch.cat([top, torch.randint(side[1], (count, 1), generator=rng)], 1) - size // 2


def blackened(x: Tensor, corner: Tensor, size: int) -> Tensor:
    """Each image with its square black."""
    height, width = x.shape[2:]
    top, left = corner[:, :1], corner[:, 1:]
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside_rows = (rows >= top) & (rows < top + size)
    inside_columns = (columns >= left) & (columns < left + size)
    return x.masked_fill((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0.0)


def cutout(x: Tensor, size: int, rng: Generator) -> Tensor:
    """Blacken one square of `size` pixels a side, centred anywhere (DeVries & Taylor 2017)."""
    return blackened(x, corners(len(x), (x.shape[2], x.shape[3]), size, rng).to(x.device, non_blocking=True), size)


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
        draws = self.draw(len(x), (x.shape[2], x.shape[3]), rng)
        return self.apply(x, {name: drawn.to(x.device, non_blocking=True) for name, drawn in draws.items()}), y

    def draw(self, count: int, side: tuple[int, int], rng: Generator) -> dict[str, Tensor]:
        """What chance decides about a batch, an entry for each image."""
        draws = {}
        if self.crop:
            draws["offsets"] = crop_offsets(count, self.crop, rng)
        if self.flip:
            draws["flipped"] = coins(count, rng)
        if self.cutout:
            draws["corners"] = corners(count, side, self.cutout, rng)
        return draws

    def apply(self, x: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """The batch as the draws, on its device, have it."""
        if self.crop:
            x = shifted(x, draws["offsets"], self.crop)
        if self.flip:
            x = mirrored(x, draws["flipped"])
        if self.cutout:
            x = blackened(x, draws["corners"], self.cutout)
        return x
