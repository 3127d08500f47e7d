"""FedProx (Li et al., MLSys 2020): local SGD on F_k(w) + μ/2 ‖w − w_t‖²."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from clients.local.sgd import Sgd
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, Update
from fl_sim.samples import Samples
from fl_sim.training import Hook


def proximal_pull(anchors: list[torch.Tensor], mu: float) -> Hook:
    """Add the proximal term's gradient μ(w − w_t) after each backward pass."""

    def hook(model: nn.Module) -> None:
        for parameter, anchor in zip(model.parameters(), anchors, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=mu)

    return hook


@dataclass(frozen=True)
class FedProx(Sgd):
    """Local SGD held near the received model with strength `mu`; mu = 0 is plain SGD."""

    mu: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mu >= 0, "mu", self.mu, "must be 0 or more")

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        anchors = [parameter.detach().clone() for parameter in model.parameters()]
        return self.train(model, samples, ctx, after_backward=[proximal_pull(anchors, self.mu)])
