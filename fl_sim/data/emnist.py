"""EMNIST (Cohen et al. 2017) through torchvision: grey handwritten digits and letters of 28×28 pixels, in six splits.

The files hold each image transposed; here it stands upright, as MNIST's do, so that a trigger's corner and a flip mean
the same for both. The classes of `letters` are numbered from 1 in its files, here from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from fl_sim.augment import Augment
from fl_sim.data.dataset import Dataset, Facts
from fl_sim.data.torchvision_sets import Published, as_arrays, load_published
from fl_sim.samples import Samples

Split: TypeAlias = Literal["balanced", "byclass", "bymerge", "letters", "digits", "mnist"]


def published(split: str, classes: int, train_samples: int, test_samples: int) -> Published:
    """One split; the mean and deviation are those of `balanced`, from which the others differ by less than 0.01."""
    files = tuple(
        f"EMNIST/raw/emnist-{split}-{part}-ubyte"
        for part in ("train-images-idx3", "train-labels-idx1", "test-images-idx3", "test-labels-idx1")
    )
    return Published(
        title=f"EMNIST {split}",
        kind="EMNIST",
        folder="EMNIST",
        classes=classes,
        train_samples=train_samples,
        test_samples=test_samples,
        mean=(0.1751,),
        std=(0.3332,),
        files=files,
        train={"split": split, "train": True},
        test={"split": split, "train": False},
    )


PUBLISHED = {
    "balanced": published("balanced", 47, 112_800, 18_800),
    "byclass": published("byclass", 62, 697_932, 116_323),
    "bymerge": published("bymerge", 47, 697_932, 116_323),
    "letters": published("letters", 26, 124_800, 20_800),
    "digits": published("digits", 10, 240_000, 40_000),
    "mnist": published("mnist", 10, 60_000, 10_000),
}


def upright(raw: Any, size: int) -> Samples:
    """The images with rows and columns exchanged, the labels from 0."""
    samples = as_arrays(raw, size)
    return Samples(samples.images.transpose(2, 3).contiguous(), samples.labels - int(raw.split == "letters"))


@dataclass(frozen=True)
class Emnist:
    """torchvision's EMNIST, read from `root` (the folder that holds `EMNIST/raw`)."""

    clean_fraction: float = 0.05
    image_size: int = 28
    subset: float = 1.0
    split: Split = "balanced"
    augment: Augment = Augment(crop=2)
    root: str = "data"
    download: bool = False

    def __post_init__(self) -> None:
        PUBLISHED[self.split].check(self.clean_fraction, self.image_size, self.subset)

    @property
    def facts(self) -> Facts:
        return PUBLISHED[self.split].facts(self.image_size, self.subset)

    def load(self) -> Dataset:
        return load_published(
            PUBLISHED[self.split],
            self.root,
            image_size=self.image_size,
            subset=self.subset,
            download=self.download,
            decode=upright,
        )
