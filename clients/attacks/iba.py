"""IBA, irreversible backdoor (Nguyen et al., NeurIPS 2023): invisible generated noise, hidden in unused parameters.

    T(x) = clip(x + ε·tanh(G(x))), learned as LIRA's;   w moves only where |w_t − w_previous| is among the smallest

Parameters that benign training hardly touches forget a backdoor slowly. They are read off the global model's progress
since the attackers' last round; in their first round nothing is known and all may move. Optionally the update stays
within an ℓ2 ball (PGD). The configured trigger is not used: this attack brings its own. The official code begins with
ε = 0.3 and lets it fall to 0.05 over the rounds; here it is constant, `auto` as LIRA's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clients.attacks.hooked import hooked
from clients.attacks.model_replacement import ModelReplacement
from clients.attacks.pgd import projection
from clients.attacks.restrained import keeping, least_used
from clients.triggers.lira import Lira
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, Trigger, Update
from fl_sim.samples import Samples
from fl_sim.training import Hook


@dataclass(frozen=True)
class Iba(ModelReplacement):
    """Generates invisible noise for each image and moves only the parameters that benign training leaves alone."""

    boost: float | Literal["auto"] = 1.0
    epsilon: float | Literal["auto"] = "auto"
    trigger_epochs: int = 1
    trigger_lr: float = 0.01
    width: int = 8
    share: float = 0.95
    radius: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.share <= 1, "share", self.share, "must be above 0 and at most 1")
        require(self.radius is None or self.radius > 0, "radius", self.radius, "must be null or above 0")
        usable = self.epsilon == "auto" or 0 < self.epsilon <= 1
        require(usable, "epsilon", self.epsilon, "must be auto or above 0, up to 1")
        require(self.trigger_epochs >= 1, "trigger_epochs", self.trigger_epochs, "must be 1 or more")
        require(self.trigger_lr > 0, "trigger_lr", self.trigger_lr, "must be above 0")
        require(self.width >= 1, "width", self.width, "must be 1 or more channels")

    def adopt(self, trigger: Trigger) -> Lira:
        """The generator, whatever trigger is configured."""
        return Lira(self.width, epochs=self.trigger_epochs, lr=self.trigger_lr, epsilon=self.epsilon)

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        assert ctx.threatening is not None
        hooks: list[Hook] = []
        previous, parameters = ctx.threatening.previous, ctx.layout.parameters
        if previous is not None and self.share < 1:
            free = least_used((ctx.received - previous)[:parameters], self.share)
            hooks.append(keeping(ctx.layout, ctx.received, free))
        if self.radius is not None:
            anchors = [parameter.detach().clone() for parameter in model.parameters()]
            hooks.append(projection(anchors, self.radius))
        return super().update(model, samples, hooked(ctx, after_step=hooks))
