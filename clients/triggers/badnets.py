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

    `auto` is the usual 3×3 on 32×32 images, scaled with the image, and at least 2×2. Below an `opacity` of 1 the image
    shines through: x + opacity · (patch − x), as Fed-NAD's code stamps with 0.4.
    """

    size: int | Literal["auto"] = "auto"
    pattern: Literal["checkerboard", "white"] = "checkerboard"
    corner: Literal["bottom_right", "bottom_left", "top_right", "top_left"] = "bottom_right"
    margin: int = 0
    opacity: float = 1.0

    def __post_init__(self) -> None:
        require(self.size == "auto" or self.size >= 1, "size", self.size, "must be auto or 1 or more pixels")
        require(self.margin >= 0, "margin", self.margin, "must be 0 or more pixels")
        require(0 < self.opacity <= 1, "opacity", self.opacity, "must be above 0 and at most 1")

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
        covered = stamped[:, :, rows, columns]
        covered.copy_(patch.to(x) if self.opacity == 1 else covered.lerp(patch.to(x).expand_as(covered), self.opacity))
        return stamped


def _span(size: int, margin: int, length: int, *, end: bool) -> slice:
    return slice(length - margin - size, length - margin) if end else slice(margin, margin + size)
