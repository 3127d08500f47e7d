"""Blend (Chen et al. 2017): a faint pattern over the whole image, x·(1 − α) + α·pattern."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fl_sim.errors import require
from fl_sim.randomness import generator


@lru_cache(maxsize=8)
def noise_pattern(shape: tuple[int, ...], seed: int) -> Tensor:
    """One fixed pattern of uniform noise in [0, 1]."""
    return torch.rand(shape, generator=generator(seed, "blend"))


@dataclass(frozen=True)
class Blend:
    """The same noise pattern for every image, mixed in with weight `alpha`."""

    alpha: float = 0.2
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        require(0 < self.alpha <= 1, "alpha", self.alpha, "must be above 0 and at most 1")

    def __call__(self, x: Tensor) -> Tensor:
        return torch.lerp(x, noise_pattern(tuple(x.shape[1:]), self.pattern_seed).to(x).expand_as(x), self.alpha)
