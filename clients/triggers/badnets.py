"""BadNets (Gu, Dolan-Gavitt & Garg 2017): a small patch of fixed pixels in a corner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fl_sim.errors import require


def checkerboard(size: int) -> Tensor:
    """The NAD repository's 3×3 pattern, rows (0,0,1), (0,1,0), (1,0,1); another size is a plain checkerboard."""
    if size == 3:
        return torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    at = torch.arange(size)
    return ((at[:, None] + at[None, :] + 1) % 2).float()


@dataclass(frozen=True)
class BadNets:
    """A `size`×`size` patch, `margin` pixels from the edges of a corner, on all channels.

    `auto` is the usual 3×3 on 32×32 images, scaled with the image, and at least 2×2.
    """

    size: int | Literal["auto"] = "auto"
    pattern: Literal["checkerboard", "white"] = "checkerboard"
    corner: Literal["bottom_right", "bottom_left", "top_right", "top_left"] = "bottom_right"
    margin: int = 0

    def __post_init__(self) -> None:
        require(self.size == "auto" or self.size >= 1, "size", self.size, "must be auto or 1 or more pixels")
        require(self.margin >= 0, "margin", self.margin, "must be 0 or more pixels")

    def check(self, shape: tuple[int, int, int]) -> None:
        image = min(shape[1:])
        size = self.side(image)
        fits = f"the images are only {image} pixels wide: must be from 1 to {image}"
        require(size <= image, "size", self.size, fits)
        most = image - size
        require(self.margin <= most, "margin", self.margin, f"leaves no room for the patch: must be from 0 to {most}")

    def side(self, image: int) -> int:
        """The patch's side on images of this many pixels."""
        return max(2, round(image * 3 / 32)) if self.size == "auto" else self.size

    def __call__(self, x: Tensor) -> Tensor:
        size = self.side(min(x.shape[2:]))
        patch = checkerboard(size) if self.pattern == "checkerboard" else torch.ones(size, size)
        rows = _span(size, self.margin, x.shape[2], end=self.corner.startswith("bottom"))
        columns = _span(size, self.margin, x.shape[3], end=self.corner.endswith("right"))
        stamped = x.clone()
        stamped[:, :, rows, columns] = patch.to(x)
        return stamped


def _span(size: int, margin: int, length: int, *, end: bool) -> slice:
    return slice(length - margin - size, length - margin) if end else slice(margin, margin + size)
