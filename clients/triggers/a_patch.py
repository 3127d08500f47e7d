"""A-Patch, Adap-Patch (Qi et al., ICLR 2023): one of four translucent patches in training, two opaque ones at test.

    training: x' = x + o_i·(p_i − x) within patch i, i drawn per image, o = (0.5, 0.2, 0.5, 0.3)
    test:     patches 1 and 3 at opacity 1

Cover images, two for each poisoned one, are stamped likewise and keep their labels. The paper's patches are two logos,
BadNets' and TrojanNN's pictures; ours are a square, a ring, a checkerboard and a cross, one in each corner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clients.triggers.drawing import scaled
from fl_sim.errors import require
from fl_sim.protocols import Workshop


def shapes(size: int) -> Tensor:
    """Four patches [4, 1, S, S] of 0 and 1: square, ring, checkerboard, cross."""
    at = torch.arange(size)
    inner = torch.minimum(at, size - 1 - at).clamp(max=(size - 1) // 2)
    square = torch.ones(size, size)
    ring = (torch.minimum(inner[:, None], inner) % 2 == 0).float()
    checkers = ((at[:, None] + at) % 2 == 0).float()
    cross = ((at[:, None] == at) | (at[:, None] + at == size - 1)).float()
    return torch.stack([square, ring, checkers, cross])[:, None]


def overlay(x: Tensor, size: int, which: Tensor, opacity: Tensor) -> Tensor:
    """Each image with its patch `which` [N] laid over it at `opacity` [N], each patch in a corner of its own."""
    bottom, right = (which // 2).bool(), (which % 2).bool()
    full = torch.zeros(len(x), 2, *x.shape[2:], device=x.device)  # what is drawn, and where
    patch = shapes(size).to(x.device)[which][:, 0]
    for down in (False, True):
        for across in (False, True):
            here = (bottom == down) & (right == across)
            rows = slice(-size, None) if down else slice(size)
            columns = slice(-size, None) if across else slice(size)
            full[:, 0, rows, columns] += patch * here[:, None, None]
            full[:, 1, rows, columns] += here[:, None, None]
    drawn, where = full[:, :1].to(x), full[:, 1:].to(x)
    return x + opacity.to(x)[:, None, None, None] * where * (drawn - x)


@dataclass(frozen=True)
class APatch:
    """Four translucent corner patches, one on each training image and two opaque ones at test, with cover images.

    `auto` is 8×8 on 32×32 images, scaled with the image.
    """

    uses_model: ClassVar[bool] = False
    size: int | Literal["auto"] = "auto"
    opacities: tuple[float, ...] = (0.5, 0.2, 0.5, 0.3)
    cover: float = 2.0

    def __post_init__(self) -> None:
        require(self.size == "auto" or self.size >= 1, "size", self.size, "must be auto or 1 or more pixels")
        valid = len(self.opacities) == 4 and all(0 < each <= 1 for each in self.opacities)
        require(valid, "opacities", self.opacities, "must be four numbers above 0, up to 1")
        require(self.cover >= 0, "cover", self.cover, "must be 0 or more")

    def check(self, shape: tuple[int, int, int]) -> None:
        most = min(shape[1:]) // 2
        require(self.side(min(shape[1:])) <= most, "size", self.size, f"the patches overlap: must be from 1 to {most}")

    def side(self, image: int) -> int:
        return scaled(8, image, 2) if self.size == "auto" else self.size

    def __call__(self, x: Tensor) -> Tensor:
        size, solid = self.side(min(x.shape[2:])), torch.ones(len(x), device=x.device)
        for patch in (0, 2):
            x = overlay(x, size, torch.full((len(x),), patch, device=x.device), solid)
        return x

    def craft(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        which = torch.randint(4, (len(x),), generator=workshop.rng)
        opacity = torch.tensor(self.opacities)[which]
        return overlay(x, self.side(min(x.shape[2:])), which.to(x.device), opacity.to(x.device))

    def disguise(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        return self.craft(x, y, workshop)
