"""Draws docs/images/synthetic.png, what `data=synthetic` looks like: `python docs/synthetic_picture.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from fl_sim.data.dataset import Dataset
from fl_sim.data.synthetic import Synthetic

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DIFFICULTIES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
SHAPES = ((8, 1), (8, 3), (16, 3), (32, 1), (32, 3), (64, 3))
CLASSES, EACH = 4, 3


def nearest_mean(data: Dataset) -> float:
    """The test accuracy of the simplest classifier: the class whose mean training image is nearest."""
    x, y = data.train.images.flatten(1).float(), data.train.labels
    means = torch.stack([x[y == label].mean(0) for label in range(int(y.max()) + 1)])
    predicted = torch.cdist(data.test.images.flatten(1).float(), means).argmin(1)
    return float((predicted == data.test.labels).float().mean())


def tile(data: Dataset) -> Tensor:
    """The first EACH images of CLASSES classes, one class a row, with a white line between images."""
    rows = []
    for label in range(CLASSES):
        images = data.train.images[data.train.labels == label][:EACH]
        padded = torch.nn.functional.pad(images, (0, 1, 0, 1), value=255)
        rows.append(torch.cat(list(padded.expand(-1, 3, -1, -1)), dim=2))
    return torch.cat(rows, dim=1).permute(1, 2, 0)


def main() -> None:
    figure, axes = plt.subplots(2, 6, figsize=(12, 6.6), layout="constrained")
    for axis, difficulty in zip(axes[0], DIFFICULTIES, strict=True):
        data = Synthetic(image_size=32, difficulty=difficulty).load()
        axis.imshow(tile(data), interpolation="nearest")
        axis.set_title(f"difficulty={difficulty:g}\nnearest mean: {nearest_mean(data):.0%}", fontsize=10)
    for axis, (size, channels) in zip(axes[1], SHAPES, strict=True):
        data = Synthetic(image_size=size, channels=channels, samples=200, test_samples=10).load()
        axis.imshow(tile(data), interpolation="nearest")
        axis.set_title(f"image_size={size}\nchannels={channels}", fontsize=10)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle("data=synthetic: one class a row; above by difficulty (32 pixels, 10 classes), below by shape")
    figure.savefig(Path(__file__).parent / "images" / "synthetic.png", dpi=64)


if __name__ == "__main__":
    main()
