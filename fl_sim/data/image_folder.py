"""Any folder of images: `root/train/CLASS/...` and `root/test/CLASS/...`, torchvision's `ImageFolder` layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fl_sim.augment import Augment
from fl_sim.data.cache import cached
from fl_sim.data.dataset import Dataset, Facts, check_common, kept, thinned
from fl_sim.data.pictures import class_names, decoded, listed
from fl_sim.errors import ConfigError, require


@dataclass(frozen=True)
class Contents:
    """The classes of an image folder, and its files with their labels."""

    names: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]


def contents(root: str) -> Contents:
    """Look at the names only. The second part may be called `val`; a class's label is its place in `train`."""
    folder = Path(root).expanduser()
    parts = [folder / name for name in ("train", "test", "val") if (folder / name).is_dir()]
    there = len(parts) >= 2 and parts[0].name == "train"
    require(there, "root", root, "must be a folder that holds train/CLASS/... and test/CLASS/... (or val)")
    names = class_names(parts[0])
    require(2 <= len(names) <= 1000, "root", root, f"train there has {len(names)} classes, must be 2 to 1000 folders")
    strange = sorted(set(class_names(parts[1])) - set(names))
    require(not strange, "root", root, f"{parts[1].name}/{''.join(strange[:1])} there is no class of train")
    found = Contents(names, listed(parts[0], names), listed(parts[1], names))
    empty = sorted(set(range(len(names))) - {label for _, label in found.train})
    require(not empty, "root", root, f"train/{names[empty[0]] if empty else ''} there holds no images")
    require(len(found.test) > 0, "root", root, f"{parts[1].name} there holds no images")
    return found


@dataclass(frozen=True)
class ImageFolder:
    """Your own images: `train` and `test` (or `val`) in `root`, each with one folder for each class.

    An image's shorter side is scaled to `image_size` and the middle cut out of the longer one. `mean` and `std` are one
    number for each channel, or one for all.
    """

    clean_fraction: float = 0.05
    image_size: int = 64
    subset: float = 1.0
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    augment: Augment = Augment(crop=4, flip=True)
    root: str = "data"

    def __post_init__(self) -> None:
        require(self.channels in (1, 3), "channels", self.channels, "must be 1 or 3")
        for key, least in (("mean", 0.0), ("std", 0.001)):
            values = getattr(self, key)
            fits = len(values) in (1, self.channels) and all(least <= each <= 1 for each in values)
            require(fits, key, values, f"must be 1 or {self.channels} numbers from {least:g} to 1")
        train, test = len(self.contents.train), len(self.contents.test)
        check_common(self.clean_fraction, self.image_size, self.subset, train, len(self.contents.names))
        require(kept(test, self.subset) > 0, "subset", self.subset, f"leaves none of the {test} test images")

    @cached_property
    def contents(self) -> Contents:
        """Read once: the facts are asked for with every new model."""
        try:
            return contents(self.root)
        except OSError as error:
            raise ConfigError("root", self.root, f"can't be read ({error.strerror})") from error

    @property
    def facts(self) -> Facts:
        shape = (self.channels, self.image_size, self.image_size)
        mean, std = ((*values, *values, *values)[: self.channels] for values in (self.mean, self.std))
        return Facts(shape, len(self.contents.names), kept(len(self.contents.train), self.subset), mean, std)

    def load(self) -> Dataset:
        here = self.contents
        name = f"image_folder-{self.channels}x{self.image_size}"
        data = cached(
            Path(self.root).expanduser(),
            name,
            lambda: [path for path, _ in (*here.train, *here.test)],
            lambda: Dataset(
                *(
                    decoded(part, self.root, size=self.image_size, channels=self.channels, fit="crop")
                    for part in (here.train, here.test)
                )
            ),
        )
        return thinned(data, self.subset)
