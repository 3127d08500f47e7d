"""The UCI handwritten digits that ship inside scikit-learn: 1,797 grey 8×8 images, so the default works offline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl_sim.augment import Augment
from fl_sim.data.dataset import Dataset, Facts, check_common, from_numpy, kept, resized, thinned
from fl_sim.randomness import generator
from fl_sim.samples import Samples, stratified_indices


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits (Alpaydin & Kaynak 1998).

    A fixed stratified fifth (359 images) is the test set, the same for every seed.
    """

    clean_fraction: float = 0.10
    image_size: int = 8
    subset: float = 1.0
    augment: Augment = Augment(crop=1, cutout=1)
    root: str = "data"

    def __post_init__(self) -> None:
        check_common(self.clean_fraction, self.image_size, self.subset, 359, 10)

    @property
    def facts(self) -> Facts:
        shape = (1, self.image_size, self.image_size)
        return Facts(shape, 10, kept(1438, self.subset), mean=(0.3053,), std=(0.3760,))

    def load(self) -> Dataset:
        from sklearn.datasets import load_digits  # imported late: it takes half a second

        raw = load_digits()
        images = np.round(raw.images * (255 / 16)).astype(np.uint8)[:, None]
        samples = from_numpy(images, raw.target)
        samples = Samples(resized(samples.images, self.image_size), samples.labels)
        test, train = stratified_indices(samples.labels, 0.2, generator(0, "digits", "test"))
        return thinned(Dataset(samples[train], samples[test]), self.subset)
