"""GTSRB (Stallkamp et al. 2012) through torchvision: photographs of 43 German traffic signs, 15 to 250 pixels a side.

torchvision's training part has 26,640 images, fewer than the 39,209 of the competition's final training set. Each image
is stretched to a square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fl_sim.augment import Augment
from fl_sim.data.dataset import Dataset, Facts
from fl_sim.data.pictures import decoded
from fl_sim.data.torchvision_sets import Published, load_published
from fl_sim.samples import Samples

PUBLISHED = Published(
    title="GTSRB",
    kind="GTSRB",
    folder="gtsrb",
    classes=43,
    train_samples=26_640,
    test_samples=12_630,
    mean=(0.3403, 0.3121, 0.3214),
    std=(0.2724, 0.2608, 0.2669),
    train={"split": "train"},
    test={"split": "test"},
)


def stretched(raw: Any, size: int) -> Samples:
    """The files that torchvision lists, as squares."""
    return decoded(raw._samples, str(raw.root), size=size, channels=3, fit="stretch")


@dataclass(frozen=True)
class Gtsrb:
    """torchvision's GTSRB traffic signs, read from `root` (the folder that holds `gtsrb`)."""

    clean_fraction: float = 0.05
    image_size: int = 32
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
            PUBLISHED,
            self.root,
            image_size=self.image_size,
            subset=self.subset,
            download=self.download,
            decode=stretched,
        )
