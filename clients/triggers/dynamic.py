"""Dynamic, the input-aware trigger (Nguyen & Tran, NeurIPS 2020): every image has a pattern of its own.

    x' = x + (G(x) − x)·M(x)
    min over G, M: CE(f(x'), target) + CE(f(x crossed), y) + λ·‖x_i − x_j‖ / ‖p_i − p_j‖,   p = G·M

"Crossed" images carry another image's pattern and keep their labels; as cover they teach the model that only an
image's own pattern counts. The paper has as many of them as poisoned images (cover 1); clients with 65 samples learn
the backdoor more reliably with a fifth. The paper trains M first, with a penalty above density 0.032; here G and M are
learned together, and M keeps its density by construction: a steep sigmoid around the image's own quantile. `auto`
density is 0.032, and at least four pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.triggers.generator import Painted, Painter
from clients.triggers.lira import wanted_entropy
from fl_sim.errors import require
from fl_sim.protocols import Workshop
from fl_sim.samples import Samples
from fl_sim.training import Objective

STEEPNESS = 10.0


def sparse_mask(raw: Tensor, pixels: int) -> Tensor:
    """Maps [B, 1, H, W] -> masks in (0, 1) that are above a half in exactly the `pixels` highest places."""
    ranked = raw.flatten(1).topk(min(pixels + 1, raw.shape[2] * raw.shape[3]), dim=1).values
    threshold = (ranked[:, -2] + ranked[:, -1]) / 2
    return torch.sigmoid(STEEPNESS * (raw - threshold[:, None, None, None]))


def another(x: Tensor) -> Tensor:
    """A different image for each: the next one of the batch; of a lone image its mirror image."""
    return x.roll(1, 0) if len(x) > 1 else x.flip(3)


def diversity(x: Tensor, patterns: Tensor) -> Tensor:
    """The mean of ‖x_i − x_j‖ / ‖p_i − p_j‖ over neighbours: small if different images get different patterns."""
    apart = (x - another(x)).flatten(1).norm(dim=1)
    patterned = (patterns - another(patterns)).flatten(1).norm(dim=1)
    return torch.mean(apart / (patterned + 1e-2))


@dataclass(frozen=True)
class Dynamic(Painted):
    """A few pixels whose places and colours a generator chooses for each image; another image's choice does nothing."""

    density: float | Literal["auto"] = "auto"
    diversity: float = 1.0
    cover: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.density == "auto" or 0 < self.density < 1
        require(fits, "density", self.density, "must be auto or above 0 and below 1")
        require(self.diversity >= 0, "diversity", self.diversity, "must be 0 or more")
        require(self.cover >= 0, "cover", self.cover, "must be 0 or more")

    def outputs(self, channels: int) -> int:
        return channels + 1

    def pixels(self, x: Tensor) -> int:
        """How many pixels of such images are marked."""
        area = x.shape[2] * x.shape[3]
        return max(4, round(0.032 * area)) if self.density == "auto" else max(1, round(self.density * area))

    def drawn(self, painter: Painter, x: Tensor) -> tuple[Tensor, Tensor]:
        """G(x) and M(x)."""
        raw = painter(x)
        return torch.sigmoid(raw[:, :-1]), sparse_mask(raw[:, -1:], self.pixels(x))

    def painted(self, painter: Painter, x: Tensor) -> Tensor:
        colours, mask = self.drawn(painter, x)
        return x + (colours - x) * mask

    def objective(self, samples: Samples, workshop: Workshop) -> Objective:
        def loss(painter: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            assert isinstance(painter, Painter)
            colours, mask = self.drawn(painter, x)
            stamped = x + (colours - x) * mask
            crossed = x + (another(colours) - x) * another(mask)
            spread = self.diversity * diversity(x, colours * mask)
            return wanted_entropy(stamped, y, workshop) + F.cross_entropy(workshop.model(crossed), y) + spread

        return loss

    @torch.no_grad()
    def disguise(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        """Images with another image's pattern."""
        colours, mask = self.drawn(self.painter(x), another(x))
        return x + (colours - x) * mask
