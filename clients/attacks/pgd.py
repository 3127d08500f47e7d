"""PGD against the norm (Wang et al., NeurIPS 2020, "Attack of the Tails"): poisoning that stays near the global model.

After each step of the poisoned training the parameters are projected onto the ball around the received ones,
w ← w_t + min(1, δ/‖w − w_t‖₂) · (w − w_t); batch statistics are left out. The paper then may replace the model:
`boost` scales the projected update. Deviations: its code projects after every tenth batch and at the end; we do so
after each, as local trainings of a few batches would otherwise be clipped only. Its δ is tuned by hand; `auto` is the
norm of an honest update of the attacker's own, which costs one more benign training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from clients.attacks.hooked import honest_update, hooked
from clients.attacks.model_replacement import ModelReplacement
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, Update
from fl_sim.samples import Samples
from fl_sim.training import Hook


def projection(anchors: list[Tensor], radius: float | Tensor) -> Hook:
    """Project all parameters together onto the ℓ2 ball of this radius around `anchors`."""

    @torch.no_grad()
    def hook(model: nn.Module) -> None:
        moved = [parameter - anchor for parameter, anchor in zip(model.parameters(), anchors, strict=True)]
        norm = torch.stack([part.norm() for part in moved]).norm()
        factor = (radius / norm.clamp(min=1e-12)).clamp(max=1)
        for parameter, anchor, part in zip(model.parameters(), anchors, moved, strict=True):
            # Inside the ball nothing moves, not even by rounding.
            parameter.copy_(torch.where(factor < 1, anchor + factor * part, parameter))

    return hook


@dataclass(frozen=True)
class Pgd(ModelReplacement):
    """Trains on stamped data within a ball of `radius` around the received model; `auto`: as far as an honest client.

    `boost` scales the result.
    """

    boost: float | Literal["auto"] = 1.0
    radius: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        usable = self.radius == "auto" or self.radius > 0
        require(usable, "radius", self.radius, "must be auto or a number above 0")

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        anchors = [parameter.detach().clone() for parameter in model.parameters()]
        if self.radius == "auto":
            honest = honest_update(self.client, model, samples, ctx)
            radius: float | Tensor = honest.delta[: ctx.layout.parameters].norm()
        else:
            radius = self.radius
        return super().update(model, samples, hooked(ctx, after_step=[projection(anchors, radius)]))
