"""Fashion-MNIST (Xiao et al. 2017) through torchvision: 60,000 + 10,000 grey images of clothing, 28×28 pixels."""

from __future__ import annotations

from dataclasses import dataclass

from fl_sim.augment import Augment
from fl_sim.data.dataset import Dataset, Facts
from fl_sim.data.torchvision_sets import IDX_PARTS, Published, load_published

PUBLISHED = Published(
    title="Fashion-MNIST",
    kind="FashionMNIST",
    folder="FashionMNIST",
    classes=10,
    train_samples=60_000,
    test_samples=10_000,
    mean=(0.2860,),
    std=(0.3530,),
    files=tuple(f"FashionMNIST/raw/{part}-ubyte" for part in IDX_PARTS),
)


@dataclass(frozen=True)
class FashionMnist:
    """torchvision's Fashion-MNIST, read from `root` (the folder that holds `FashionMNIST/raw`)."""

    clean_fraction: float = 0.05
    image_size: int = 28
    subset: float = 1.0
    augment: Augment = Augment(crop=2, flip=True)
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
