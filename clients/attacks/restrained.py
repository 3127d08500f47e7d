"""Local training that is held back: hooks around whatever the benign client trains with, and what they hold back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fl_sim.layout import Layout
from fl_sim.protocols import ClientContext
from fl_sim.training import Fitted, Hook


def with_hooks(ctx: ClientContext, *, backward: Iterable[Hook] = (), step: Iterable[Hook] = ()) -> ClientContext:
    """A context whose `fit` runs these hooks after each backward pass and step, after the client's own hooks."""
    inner = ctx.fit
    backward, step = tuple(backward), tuple(step)

    def fit(
        *given: Any, after_backward: Iterable[Hook] = (), after_step: Iterable[Hook] = (), **settings: Any
    ) -> Fitted:
        settings |= {"after_backward": (*after_backward, *backward), "after_step": (*after_step, *step)}
        return inner(*given, **settings)

    return replace(ctx, fit=fit)


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


def within_ball(layout: Layout, received: Tensor, radius: float) -> Hook:
    """A hook that projects the parameters onto the ℓ2 ball of this radius around what was received."""
    origin = layout.parts(received)

    @torch.no_grad()
    def hook(model: nn.Module) -> None:
        moved = [parameter - old for parameter, old in zip(model.parameters(), origin, strict=False)]
        length = torch.stack([part.square().sum() for part in moved]).sum().sqrt()
        factor = (radius / length.clamp_min(1e-12)).clamp(max=1)
        for parameter, part, old in zip(model.parameters(), moved, origin, strict=False):
            parameter.copy_(old + factor * part)

    return hook
