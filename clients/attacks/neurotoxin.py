"""Neurotoxin (Zhang et al., ICML 2022): poisoning that touches only what honest clients hardly use.

Of the last observed progress ĝ of the federation, the `top` share of coordinates with the largest *absolute* values is
where honest updates will overwrite a backdoor. The attacker projects its gradient onto the others at each step.
ĝ is what the global model moved by since the attackers last attacked. Without it, at first, it is the gradient of an
epoch on the attacker's own clean samples, as the official code always does. Parameters only; batch statistics follow
the training. `boost` is that of model replacement: the paper's attackers clip their norm instead.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.attacks.hooked import hooked
from clients.attacks.model_replacement import ModelReplacement
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, Update
from fl_sim.samples import Samples
from fl_sim.training import Hook


def largest(values: Tensor, share: float) -> Tensor:
    """A mask of the round(share · n) coordinates with the largest absolute values."""
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[values.abs().topk(round(share * len(values))).indices] = True
    return mask


def benign_gradient(model: Classifier, samples: Samples, chunk: int = 128) -> Tensor:
    """The gradient of the mean loss on clean samples, as one vector in the order of the parameters."""
    own = deepcopy(model).eval()  # in evaluation mode no chunk moves the batch statistics
    for x, y in samples.chunks(chunk):
        (F.cross_entropy(own(x), y, reduction="sum") / len(samples)).backward()
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in own.parameters()])


def stilled(model: nn.Module, mask: Tensor) -> Hook:
    """Zero the gradient of the masked coordinates after each backward pass."""
    parts = mask.split([parameter.numel() for parameter in model.parameters()])
    masks = [part.view_as(parameter) for part, parameter in zip(parts, model.parameters(), strict=True)]

    def hook(trained: nn.Module) -> None:
        for parameter, still in zip(trained.parameters(), masks, strict=True):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(still, 0)

    return hook


@dataclass(frozen=True)
class Neurotoxin(ModelReplacement):
    """Trains on stamped data, but not the `top` share of parameters that the federation has lately moved the most."""

    boost: float | Literal["auto"] = 1.0
    top: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.top < 1, "top", self.top, "must be a fraction from 0 to below 1")

    def mask(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Tensor:
        """Which parameters stay as they were received."""
        assert ctx.threatening is not None
        previous = ctx.threatening.previous
        progress = benign_gradient(model, samples) if previous is None else ctx.received - previous
        return largest(progress[: ctx.layout.parameters], self.top)

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        mask = self.mask(model, samples, ctx)
        update = super().update(model, samples, hooked(ctx, after_backward=[stilled(model, mask)]))
        delta = update.delta.clone()
        delta[: len(mask)].masked_fill_(mask, 0)  # weight decay moves a parameter even without a gradient
        return replace(update, delta=delta)
