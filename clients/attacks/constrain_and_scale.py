"""Constrain-and-scale (Bagdasaryan et al., AISTATS 2020): model replacement that also trains to look normal.

L = α · L_class + (1 − α) · L_ano, then the update is scaled by γ (`boost`), at most up to the norm bound S (`max_norm`)
that the server is thought to accept: the factor is min(γ, S/‖w − w_t‖). L_ano is the Euclidean distance to the received
parameters, or 1 − their cosine. With α = 1 and a `max_norm` this is the paper's train-and-scale. `max_norm: auto` is
the norm of an honest update of the attacker's own, which costs one more benign training. Deviation: only parameters
count and are scaled, never batch statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.attacks.hooked import honest_update, hooked, within
from clients.attacks.model_replacement import ModelReplacement
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, Update
from fl_sim.samples import Samples
from fl_sim.training import Objective


def anomaly(parameters: Tensor, received: Tensor, kind: Literal["distance", "cosine"]) -> Tensor:
    """‖w − w_t‖₂ or 1 − cos(w, w_t)."""
    if kind == "distance":
        distance: Tensor = (parameters - received).norm()  # whose gradient at zero is zero
        return distance
    cosine: Tensor = F.cosine_similarity(parameters, received, dim=0)
    return 1 - cosine


def constrained(
    received: Tensor, alpha: float, kind: Literal["distance", "cosine"]
) -> Callable[[Objective], Objective]:
    """From L to α · L + (1 − α) · L_ano."""

    def around(inner: Objective) -> Objective:
        def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            parameters = torch.cat([parameter.flatten() for parameter in model.parameters()])
            return alpha * inner(model, x, y) + (1 - alpha) * anomaly(parameters, received, kind)

        return objective

    return around


@dataclass(frozen=True)
class ConstrainAndScale(ModelReplacement):
    """Trains on stamped data with a penalty on looking abnormal, and scales the update within a norm bound."""

    alpha: float = 0.7
    anomaly: Literal["distance", "cosine"] = "distance"
    max_norm: float | Literal["auto"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.alpha <= 1, "alpha", self.alpha, "must be above 0 and at most 1")
        usable = self.max_norm in (None, "auto") or float(self.max_norm or 0) > 0
        require(usable, "max_norm", self.max_norm, "must be null, auto or a number above 0")

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        split = ctx.layout.parameters
        if self.max_norm == "auto":
            bound: float | Tensor | None = honest_update(self.client, model, samples, ctx).delta[:split].norm()
        else:
            bound = self.max_norm
        around = None if self.alpha == 1 else constrained(ctx.received[:split], self.alpha, self.anomaly)
        update = super().update(model, samples, hooked(ctx, around=around))
        return update if bound is None else replace(update, delta=within(update.delta, bound, ctx.layout))
