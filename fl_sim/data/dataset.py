"""What every data set is once loaded, and the server's held-out clean share of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fl_sim.augment import Augment
from fl_sim.errors import require
from fl_sim.randomness import generator
from fl_sim.samples import Samples, stratified_indices


@dataclass(frozen=True)
class Dataset:
    """Training and test samples, both uint8."""

    train: Samples
    test: Samples

    def to(self, device: torch.device) -> Dataset:
        return Dataset(_to(self.train, device), _to(self.test, device))


@dataclass(frozen=True)
class Facts:
    """What is known of a data set before it is loaded."""

    shape: tuple[int, int, int]
    classes: int
    train_samples: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Source(Protocol):
    """A data set's spec: what is known before loading, and the loading."""

    @property
    def clean_fraction(self) -> float: ...

    @property
    def augment(self) -> Augment: ...

    @property
    def facts(self) -> Facts: ...

    def load(self) -> Dataset: ...


def check_common(clean_fraction: float, image_size: int, subset: float, fewest: int, classes: int) -> None:
    """The checks that every data set's spec makes of the keys they share; `fewest` images are in its smaller part."""
    require(0 <= clean_fraction < 1, "clean_fraction", clean_fraction, "must be a fraction from 0 to below 1")
    require(8 <= image_size <= 256, "image_size", image_size, "must be from 8 to 256 pixels")
    require(0 < subset <= 1, "subset", subset, "must be a fraction above 0, up to 1")
    enough = kept(fewest, subset) >= classes
    allowed = f"{kept(fewest, subset)} of {fewest} images are fewer than the {classes} classes"
    require(enough, "subset", subset, allowed)


def kept(count: int, subset: float) -> int:
    """How many of `count` images `thinned` keeps."""
    return round(subset * count)


def thinned(data: Dataset, subset: float) -> Dataset:
    """A share of both parts, of each class alike; the same images whatever the run's seeds are."""
    if subset == 1:
        return data
    parts = {"train": data.train, "test": data.test}
    return Dataset(*(part.stratified(subset, generator(0, "subset", name))[0] for name, part in parts.items()))


def hold_out(train: Samples, share: float, seed: int) -> tuple[Samples | None, Tensor]:
    """The server's stratified clean set (None for a share of zero) and the indices left for the clients."""
    if share == 0:
        return None, torch.arange(len(train))
    labels = train.labels.cpu()
    clean, rest = stratified_indices(labels, share, generator(seed, "clean set"))
    return train[clean], rest


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 images at another resolution, bilinear with antialiasing."""
    if images.shape[-1] == size and images.shape[-2] == size:
        return images
    parts = [
        F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True).round_().clamp_(0, 255)
        for part in images.split(4096)
    ]
    return torch.cat([part.to(torch.uint8) for part in parts])


def from_numpy(images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], labels: object) -> Samples:
    """Samples from [N, C, H, W] uint8 images and a sequence of labels."""
    return Samples(torch.from_numpy(np.ascontiguousarray(images)), torch.as_tensor(labels, dtype=torch.long))


def _to(samples: Samples, device: torch.device) -> Samples:
    return Samples(samples.images.to(device), samples.labels.to(device), samples.transforms)
