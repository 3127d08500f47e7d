"""CIFAR-10 (Krizhevsky 2009) through torchvision: 50,000 + 10,000 colour images of 32×32 pixels."""

from __future__ import annotations

from dataclasses import dataclass

from fl_sim.augment import Augment
from fl_sim.data.dataset import Dataset, Facts
from fl_sim.data.torchvision_sets import Published, load_published

PUBLISHED = Published(
    title="CIFAR-10",
    kind="CIFAR10",
    folder="cifar-10-batches-py",
    classes=10,
    train_samples=50_000,
    test_samples=10_000,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)


@dataclass(frozen=True)
class Cifar10:
    """torchvision's CIFAR-10, read from `root` (the folder that holds `cifar-10-batches-py`)."""

    clean_fraction: float = 0.05
    image_size: int = 32
    subset: float = 1.0
    augment: Augment = Augment(crop=4, flip=True)
    root: str = "data"
    download: bool = False

    def __post_init__(self) -> None:
        PUBLISHED.check(self.clean_fraction, self.image_size, self.subset)

    @property
    def facts(self) -> Facts:
        return PUBLISHED.facts(self.image_size, self.subset)

    def load(self) -> Dataset:
        return load_published(
            PUBLISHED, self.root, image_size=self.image_size, subset=self.subset, download=self.download
        )
