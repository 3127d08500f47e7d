"""Procedural images of any size, number of classes and difficulty: for scale, benchmarks and tests, offline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fl_sim.augment import Augment
from fl_sim.data.dataset import Dataset, Facts, check_common, kept, thinned
from fl_sim.errors import require
from fl_sim.randomness import generator
from fl_sim.samples import Samples

CHUNK = 8192


MOST = 10**12
"""Samples; no memory holds as many."""


@dataclass(frozen=True)
class Synthetic:
    """Each class is a smooth random pattern; each image shifts it, dims it and adds smooth and fine noise.

    `difficulty` 0 leaves the bare pattern; at 1 the noise is as strong as the pattern. The images depend on
    `pattern_seed` alone, not on the run's seeds.
    """

    clean_fraction: float = 0.05
    image_size: int = 16
    subset: float = 1.0
    channels: int = 3
    classes: int = 10
    samples: int = 5000
    test_samples: int = 1000
    difficulty: float = 0.5
    pattern_seed: int = 0
    augment: Augment = Augment(crop=1)
    root: str = "data"

    def __post_init__(self) -> None:
        require(self.channels in (1, 3), "channels", self.channels, "must be 1 or 3")
        require(2 <= self.classes <= 1000, "classes", self.classes, "must be from 2 to 1000")
        for key in ("samples", "test_samples"):
            possible = self.classes <= getattr(self, key) <= MOST
            allowed = f"must be at least the number of classes, {self.classes}, and at most {MOST:,}"
            require(possible, key, getattr(self, key), allowed)
        fewest = min(self.samples, self.test_samples)
        check_common(self.clean_fraction, self.image_size, self.subset, fewest, self.classes)
        require(0 <= self.difficulty <= 2, "difficulty", self.difficulty, "must be a number from 0 to 2")

    @property
    def facts(self) -> Facts:
        shape = (self.channels, self.image_size, self.image_size)
        samples = kept(self.samples, self.subset)
        return Facts(shape, self.classes, samples, (0.5,) * self.channels, (0.2,) * self.channels)

    def load(self) -> Dataset:
        rng = generator(self.pattern_seed, "synthetic", "patterns")
        patterns = _smooth(self.classes, self.channels, self.image_size, rng)
        train, test = self._draw(patterns, self.samples, "train"), self._draw(patterns, self.test_samples, "test")
        return thinned(Dataset(train, test), self.subset)

    def _draw(self, patterns: Tensor, count: int, part: str) -> Samples:
        rng = generator(self.pattern_seed, "synthetic", part)
        # All that follows at once, and untouched: what can't be had is refused now, not when a part of it has filled
        # the memory.
        torch.empty(count * (patterns[0].numel() + 4 * 8), dtype=torch.uint8)
        labels = torch.arange(count) % self.classes
        labels = labels[torch.randperm(count, generator=rng)]
        images = torch.empty(count, *patterns.shape[1:], dtype=torch.uint8)
        for at in torch.arange(count).split(CHUNK):
            x = _shifted(patterns[labels[at]], self.image_size // 8, rng)
            contrast = 1 - self.difficulty * 0.4 * torch.rand(len(at), 1, 1, 1, generator=rng)
            noise = _smooth(len(at), self.channels, self.image_size, rng)
            fine = torch.randn(x.shape, generator=rng)
            x = contrast * x + self.difficulty * (0.8 * noise + 0.4 * fine)
            images[at] = (127.5 + 50 * x).round_().clamp_(0, 255).to(torch.uint8)
        return Samples(images, labels)


def _smooth(count: int, channels: int, size: int, rng: Generator) -> Tensor:
    """Low-frequency random fields with mean 0 and variance 1 each."""
    coarse = torch.randn(count, channels, 4, 4, generator=rng)
    fields = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    centred = fields - fields.mean((1, 2, 3), keepdim=True)
    return centred / centred.std((1, 2, 3), keepdim=True)


def _shifted(x: Tensor, most: int, rng: Generator) -> Tensor:
    """Each image rolled by its own offsets of up to `most` pixels."""
    count, channels, height, width = x.shape
    offsets = torch.randint(-most, most + 1, (2, count, 1), generator=rng)
    rows = (torch.arange(height) + offsets[0]) % height
    columns = (torch.arange(width) + offsets[1]) % width
    x = x.gather(2, rows[:, None, :, None].expand(count, channels, height, width))
    return x.gather(3, columns[:, None, None, :].expand(count, channels, height, width))
