"""CIFAR-10 (Krizhevsky 2009) through torchvision: 50,000 + 10,000 colour images of 32×32 pixels."""

from __future__ import annotations

from dataclasses import dataclass

from fl_sim.augment import Augment
from fl_sim.data.dataset import Dataset, Facts, check_common, from_numpy, resized
from fl_sim.errors import ConfigError
from fl_sim.samples import Samples


@dataclass(frozen=True)
class Cifar10:
    """torchvision's CIFAR-10, read from `root` (the folder that holds `cifar-10-batches-py`)."""

    clean_fraction: float = 0.05
    image_size: int = 32
    augment: Augment = Augment(crop=4, flip=True)
    root: str = "data"
    download: bool = False

    def __post_init__(self) -> None:
        check_common(self.clean_fraction, self.image_size)

    @property
    def facts(self) -> Facts:
        shape = (3, self.image_size, self.image_size)
        return Facts(shape, 10, 50_000, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))

    def load(self) -> Dataset:
        return Dataset(self._part(train=True), self._part(train=False))

    def _part(self, *, train: bool) -> Samples:
        from torchvision.datasets import CIFAR10  # imported late: it takes a second

        try:
            raw = CIFAR10(self.root, train=train, download=self.download)
        except (RuntimeError, OSError) as error:
            hint = (
                "no complete CIFAR-10 (cifar-10-batches-py) there; give its folder, or data.download=true to fetch it"
            )
            raise ConfigError("root", self.root, hint if not self.download else f"download failed: {error}") from error
        samples = from_numpy(raw.data.transpose(0, 3, 1, 2), raw.targets)
        return Samples(resized(samples.images, self.image_size), samples.labels)
