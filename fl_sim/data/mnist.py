"""MNIST (LeCun et al. 1998) through torchvision: 60,000 + 10,000 grey handwritten digits of 28×28 pixels."""

from __future__ import annotations

from dataclasses import dataclass

from fl_sim.augment import Augment
from fl_sim.data.dataset import Dataset, Facts
from fl_sim.data.torchvision_sets import IDX_PARTS, Published, load_published

PUBLISHED = Published(
    title="MNIST",
    kind="MNIST",
    folder="MNIST",
    classes=10,
    train_samples=60_000,
    test_samples=10_000,
    mean=(0.1307,),
    std=(0.3081,),
    files=tuple(f"MNIST/raw/{part}-ubyte" for part in IDX_PARTS),
)


@dataclass(frozen=True)
class Mnist:
    """torchvision's MNIST, read from `root` (the folder that holds `MNIST/raw`)."""

    clean_fraction: float = 0.05
    image_size: int = 28
    subset: float = 1.0
    augment: Augment = Augment(crop=2)
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
