"""Image files in folders: which there are, and decoding them to one size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch

from fl_sim.errors import ConfigError
from fl_sim.samples import Samples

Listing: TypeAlias = Sequence[tuple[str, int]]
"""Image files, each with its label."""
Fit: TypeAlias = Literal["stretch", "crop"]
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of image files: torchvision's list."""


def class_names(folder: Path) -> list[str]:
    """The subfolders, sorted: a class's label is its place here, as in torchvision's `ImageFolder`."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def listed(folder: Path, names: Sequence[str]) -> list[tuple[str, int]]:
    """The image files under each class's folder, in torchvision's order."""
    return [
        (os.path.join(top, file), label)
        for label, name in enumerate(names)
        for top, _, files in sorted(os.walk(folder / name, followlinks=True))
        for file in sorted(files)
        if file.lower().endswith(ENDINGS)
    ]


def decoded(listing: Listing, root: str, *, size: int, channels: int, fit: Fit) -> Samples:
    """Image files as uint8 squares, bilinear with antialiasing.

    `stretch` scales both sides; `crop` scales the shorter one and cuts the middle out of the longer one.
    """
    from PIL import Image  # imported late, as torchvision: they take a second
    from torchvision.transforms import functional as vision

    images = torch.empty(len(listing), channels, size, size, dtype=torch.uint8)

    def read(at: int) -> None:
        path, _ = listing[at]
        try:
            with Image.open(path) as file:
                if file.mode.startswith(("I", "F")):  # which Pillow would clip at 255 instead of scaling
                    raise ValueError(f"its pixels are {file.mode}, not 8 bits each")
                picture = file.convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's ways to say no
            reason = " ".join(str(error).split())
            raise ConfigError("root", root, f"{path} can't be read ({reason})") from error
        picture = vision.resize(picture, [size, size] if fit == "stretch" else [size])
        pixels = np.asarray(vision.center_crop(picture, [size, size]), dtype=np.uint8)
        images[at] = torch.tensor(pixels).view(size, size, channels).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        for _ in pool.map(read, range(len(listing))):
            continue
    return Samples(images, torch.tensor([label for _, label in listing], dtype=torch.long))
