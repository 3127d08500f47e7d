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
    """A `size`×`size` patch, `margin` pixels from the edges of a corner, on all channels."""

    size: int = 3
    pattern: Literal["checkerboard", "white"] = "checkerboard"
    corner: Literal["bottom_right", "bottom_left", "top_right", "top_left"] = "bottom_right"
    margin: int = 0

    def __post_init__(self) -> None:
        require(self.size >= 1, "size", self.size, "must be 1 or more pixels")
        require(self.margin >= 0, "margin", self.margin, "must be 0 or more pixels")

    def check(self, shape: tuple[int, int, int]) -> None:
        side = min(shape[1:])
        require(
            self.size <= side, "size", self.size, f"the images are only {side} pixels wide: must be from 1 to {side}"
        )
        most = side - self.size
        require(self.margin <= most, "margin", self.margin, f"leaves no room for the patch: must be from 0 to {most}")

    def __call__(self, x: Tensor) -> Tensor:
        patch = checkerboard(self.size) if self.pattern == "checkerboard" else torch.ones(self.size, self.size)
        rows = _span(self.size, self.margin, x.shape[2], end=self.corner.startswith("bottom"))
        columns = _span(self.size, self.margin, x.shape[3], end=self.corner.endswith("right"))
        stamped = x.clone()
        stamped[:, :, rows, columns] = patch.to(x)
        return stamped


def _span(size: int, margin: int, length: int, *, end: bool) -> slice:
    return slice(length - margin - size, length - margin) if end else slice(margin, margin + size)
