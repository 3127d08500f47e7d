"""Local training that is held back to parameters which honest clients leave alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fl_sim.layout import Layout
from fl_sim.training import Hook


def least_used(progress: Tensor, share: float) -> Tensor:
    """The `share` of coordinates whose progress is smallest in absolute value, as a mask."""
    count = round(share * len(progress))
    mask = torch.zeros_like(progress, dtype=torch.bool)
    mask[progress.abs().argsort(stable=True)[:count]] = True
    return mask


def keeping(layout: Layout, received: Tensor, free: Tensor) -> Hook:
    """A hook that puts all parameters but the `free` ones back to what was received: they never move."""
    fixed = layout.parts(torch.cat([~free, torch.ones(layout.size - len(free), dtype=torch.bool, device=free.device)]))
    origin = layout.parts(received)

    @torch.no_grad()
    def hook(model: nn.Module) -> None:
        for parameter, held, old in zip(model.parameters(), fixed, origin, strict=False):
            parameter.copy_(torch.where(held, old, parameter))

    return hook
