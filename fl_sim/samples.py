"""Images and labels as tensors on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Generator, Tensor

Transform: TypeAlias = Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]]
"""(pixels, labels, rng) -> (pixels, labels), for one whole batch."""


def to_pixels(images: Tensor) -> Tensor:
    """Images as float32 pixels in [0, 1]."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def like(pixels: Tensor, images: Tensor) -> Tensor:
    """Float pixels stored as `images` are stored: rounded to uint8 if those are, as an image file would."""
    return pixels.mul(255).round_().clamp_(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else pixels


@dataclass(frozen=True)
class Samples:
    """A labelled set of images [N, C, H, W], uint8 or float in [0, 1], with what is done to each training batch."""

    images: Tensor
    labels: Tensor
    transforms: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Samples:
        """The samples at `index`; a CPU index is moved to the images' device."""
        at = index.to(self.images.device) if isinstance(index, Tensor) else index
        return replace(self, images=self.images[at], labels=self.labels[at])

    def then(self, *transforms: Transform) -> Samples:
        """The same samples with more done to each training batch."""
        return replace(self, transforms=self.transforms + transforms)

    def first(self, *transforms: Transform) -> Samples:
        """The same samples with something done to each training batch before all else: what is stamped stays put."""
        return replace(self, transforms=transforms + self.transforms)

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples in order, untransformed, as (pixels, labels)."""
        for images, labels in zip(self.images.split(size), self.labels.split(size), strict=True):
            yield to_pixels(images), labels

    def batches(self, size: int, rng: Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of shuffled, transformed training batches.

        The rest is a smaller batch; a rest of one joins the batch before it, because batch normalisation can't
        learn from a single sample's statistics.
        """
        order = torch.randperm(len(self), generator=rng).to(self.images.device, non_blocking=True)
        for at in order.split(batch_sizes(len(self), size)):
            x, y = to_pixels(self.images[at]), self.labels[at]
            for transform in self.transforms:
                x, y = transform(x, y, rng)
            yield x, y

    def stratified(self, share: float, rng: Generator) -> tuple[Samples, Samples]:
        """Two parts, the first with `share` of each class."""
        first, second = stratified_indices(self.labels.cpu(), share, rng)
        return self[first], self[second]


def batch_sizes(samples: int, size: int) -> list[int]:
    """The sizes of an epoch's batches."""
    full, rest = divmod(samples, size)
    if rest == 1 and full:
        return [size] * (full - 1) + [size + 1]
    return [size] * full + ([rest] if rest else [])


def stratified_indices(labels: Tensor, share: float, rng: Generator) -> tuple[Tensor, Tensor]:
    """Sorted indices of two parts; the first holds `share` of all samples, spread over the classes by largest rest."""
    classes, counts = labels.unique(return_counts=True)
    wanted = counts * share
    take = wanted.floor().long()
    missing = round(float(share * len(labels))) - int(take.sum())
    take[(take - wanted).argsort(stable=True)[:missing]] += 1
    chosen = []
    for label, count in zip(classes, take, strict=True):
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=rng)[: int(count)]])
    first = torch.cat(chosen).sort().values
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[first] = False
    return first, rest.nonzero().flatten()
