"""CIFAR-100 (Krizhevsky 2009) through torchvision: 50,000 + 10,000 colour images of 32×32 pixels, 100 fine classes."""

from __future__ import annotations

from dataclasses import dataclass

from fl_sim.augment import Augment
from fl_sim.data.dataset import Dataset, Facts
from fl_sim.data.torchvision_sets import Published, load_published

PUBLISHED = Published(
    title="CIFAR-100",
    kind="CIFAR100",
    folder="cifar-100-python",
    classes=100,
    train_samples=50_000,
    test_samples=10_000,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


@dataclass(frozen=True)
class Cifar100:
    """torchvision's CIFAR-100, read from `root` (the folder that holds `cifar-100-python`)."""

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
