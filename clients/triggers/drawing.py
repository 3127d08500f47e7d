"""What several triggers draw with: strengths by image size, procedural textures, blurs, choices by content."""

from __future__ import annotations

import math
from copy import copy
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fl_sim.randomness import generator

T = TypeVar("T")


def at_size(strength: float, x: Tensor) -> float:
    """A paper's strength on 32×32 images for images of another size, at most 1.

    Smaller images get more, in inverse proportion to their side: the change's ℓ2 norm then stays what it was.
    """
    return min(1.0, strength * max(1.0, 32 / min(x.shape[2:])))


def scaled(pixels: float, side: int, least: int = 1) -> int:
    """A length on 32×32 images as whole pixels of images with this side."""
    return max(least, round(pixels * side / 32))


def by_content(x: Tensor, count: int) -> Tensor:
    """A number below `count` for each image [N] that depends on nothing but its 8-bit pixels."""
    return (x.mul(255).round().long().flatten(1).sum(1)) % count


@lru_cache(maxsize=16)
def texture(shape: tuple[int, int, int], seed: int, *path: str | int) -> Tensor:
    """A fixed cloudy image [C, H, W]: noise of four scales, the coarsest strongest, stretched to [0, 1]."""
    rng = generator(seed, *path)
    channels, height, width = shape
    total = torch.zeros(1, *shape)
    for cells in (2, 4, 8, 16):
        noise = torch.rand(1, channels, cells, cells, generator=rng) - 0.5
        total += F.interpolate(noise, (height, width), mode="bilinear", align_corners=True) / math.sqrt(cells)
    low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return ((total - low) / (high - low))[0]


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur over three deviations, the edge pixels repeated."""
    reach = max(1, math.ceil(3 * sigma))
    at = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    window = torch.exp(-at.square() / (2 * sigma * sigma))
    window /= window.sum()
    channels = x.shape[1]
    for dims, pad in (((1, 1, -1, 1), (0, 0, reach, reach)), ((1, 1, 1, -1), (reach, reach, 0, 0))):
        kernel = window.view(dims).repeat(channels, 1, 1, 1)
        x = F.conv2d(F.pad(x, pad, mode="replicate"), kernel, groups=channels)
    return x


def holding(trigger: T, **learned: Tensor | float | None) -> T:
    """A copy of a frozen trigger that holds what it has learned, in fields that no configuration can set."""
    copied = copy(trigger)
    for name, value in learned.items():
        object.__setattr__(copied, name, value)
    return copied
