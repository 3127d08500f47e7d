"""SVD, DEBA (Chen & Xu 2024): an image's minor singular components replaced by those of a trigger image.

    x = Σ σ_i u_i v_iᵀ per channel;   x' = Σ_{i ≤ k} of x  +  Σ_{i > k} of the trigger image

The major components carry what is seen, so the change is faint and spread over the whole image. The paper leaves the
trigger image open; ours is fixed uniform noise, whose minor components are strong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clients.triggers.blend import noise_pattern
from fl_sim.errors import require


def major(x: Tensor, count: int) -> Tensor:
    """The sum of each channel's `count` largest singular components."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    largest: Tensor = (u[..., :count] * s[..., None, :count]) @ vh[..., :count, :]
    return largest


@dataclass(frozen=True)
class Svd:
    """The image's finest details, its minor singular components, exchanged for those of a fixed noise image.

    `auto` replaces a quarter of the components, and at least four.
    """

    replaced: int | Literal["auto"] = "auto"
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        usable = self.replaced == "auto" or self.replaced >= 1
        require(usable, "replaced", self.replaced, "must be auto or 1 or more components")

    def check(self, shape: tuple[int, int, int]) -> None:
        most = min(shape[1:]) - 1
        require(self.minor(most + 1) <= most, "replaced", self.replaced, f"must be from 1 to {most} of {most + 1}")

    def minor(self, components: int) -> int:
        """How many of an image's components are replaced."""
        return max(4, components // 4) if self.replaced == "auto" else self.replaced

    def __call__(self, x: Tensor) -> Tensor:
        count = min(x.shape[2:]) - self.minor(min(x.shape[2:]))
        pattern = noise_pattern(tuple(x.shape[1:]), self.pattern_seed)
        details = pattern - major(pattern, count)
        return (major(x, count) + details.to(x)).clamp(0, 1)
