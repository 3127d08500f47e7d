"""How much two images differ: ℓ∞, ℓ2 and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """The structural similarity of each pair of images [N] (Wang et al. 2004), pixels in [0, 1], mean over channels.

        (2·μ_x·μ_y + c₁)(2·σ_xy + c₂) / ((μ_x² + μ_y² + c₁)(σ_x² + σ_y² + c₂)),   c₁ = 0.01², c₂ = 0.03²

    averaged over all places of an 11×11 Gaussian window of deviation 1.5 that lie inside the image. In images of less
    than 11 pixels the window is the largest odd one that fits.
    """
    side = min(11, *((length - 1) // 2 * 2 + 1 for length in x.shape[2:]))
    at = torch.arange(side, device=x.device, dtype=x.dtype) - side // 2
    bell = torch.exp(-at.square() / (2 * 1.5**2))
    window = (bell[:, None] * bell / bell.sum() ** 2).expand(x.shape[1], 1, side, side)

    def mean(z: Tensor) -> Tensor:
        return F.conv2d(z, window, groups=x.shape[1])

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    places = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return places.mean((1, 2, 3))


def distances(x: Tensor, y: Tensor) -> dict[str, float]:
    """The mean over pairs of images of ℓ∞, ℓ2 and SSIM."""
    gap = (y - x).flatten(1)
    each = {"linf": gap.abs().amax(1), "l2": gap.norm(dim=1), "ssim": ssim(x, y)}
    return {name: float(values.mean()) for name, values in each.items()}
