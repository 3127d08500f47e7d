"""CerP, Cerberus poisoning (Lyu et al., AAAI 2023): a tuned trigger, and local models that neither stray nor flock.

    trigger: min over p of CE(f(x ⊕ p), target), ‖p − p₀‖₂ ≤ r, p₀ the configured trigger's pattern
    model:   CE + α·‖w − w_t‖² + β·cos(w − w_t, u),   u: another attacker's update

The paper keeps each poisoned model near the model that the same client would have trained without poison, and makes
the attackers' models of one round dissimilar in pairs. An attacker here sees no other's update of the same round: w_t
stands for the poison-free model, and u is the update of the lead attacker in the attackers' last round, which travels
in their record. The gradients of both terms are added in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from clients.attacks.hooked import hooked
from clients.attacks.model_replacement import ModelReplacement
from clients.triggers.lira import wanted_entropy
from clients.triggers.pattern import Carried, descended, mixed, opacity, own_pattern
from fl_sim.errors import require
from fl_sim.layout import Layout
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, Trigger, Update, Workshop
from fl_sim.samples import Samples, to_pixels
from fl_sim.training import Hook

LEAD = "lead update"
"""The record's entry beside the pattern."""


def projected(change: Tensor, radius: float) -> Tensor:
    """The nearest point of the ℓ2 ball of this radius."""
    nearer: Tensor = change * (radius / change.norm().clamp_min(1e-12)).clamp(max=1)
    return nearer


def closeness(layout: Layout, received: Tensor, lead: Tensor | None, pull: float, spread: float) -> Hook:
    """A hook that adds the gradient of α·‖d‖² + β·cos(d, u), d = w − w_t: 2α·d + β·(û − cos·d̂)/‖d‖."""
    split = layout.parameters

    @torch.no_grad()
    def hook(model: nn.Module) -> None:
        moved = (layout.read(model) - received)[:split]
        gradient = 2 * pull * moved
        length = moved.norm()
        if lead is not None and spread:
            ahead = lead[:split] / lead[:split].norm().clamp_min(1e-12)
            own = moved / length.clamp_min(1e-12)
            turning = (ahead - (own @ ahead) * own) / length.clamp_min(1e-12)
            gradient += torch.where(length > 0, spread * turning, 0.0)  # no direction before the first step
        whole = torch.cat([gradient, gradient.new_zeros(layout.size - split)])
        for parameter, part in zip(model.parameters(), layout.parts(whole), strict=False):
            assert parameter.grad is not None
            parameter.grad += part

    return hook


@dataclass(frozen=True)
class Tuned(Carried):
    """The carrier's own pattern, tuned within an ℓ2 ball so that the received model obeys it better."""

    epochs: int = 1
    step: float = 0.1
    radius: float = 1.0
    batch_size: int = 32

    def improved(self, pattern: Tensor, samples: Samples, workshop: Workshop) -> Tensor:
        x = to_pixels(samples.images[:1])
        hidden, origin = opacity(self.carrier, x), own_pattern(self.carrier, x)

        def loss(pattern: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return wanted_entropy(mixed(x, pattern, hidden), y, workshop)

        def step(pattern: Tensor, gradient: Tensor) -> Tensor:
            ahead = (pattern - self.step * gradient.sign()).clamp(0, 1)
            return origin + projected((ahead - origin) * (hidden > 0), self.radius)

        return descended(pattern, samples, workshop, loss, step, epochs=self.epochs, batch_size=self.batch_size)


@dataclass(frozen=True)
class Cerp(ModelReplacement):
    """Tunes the trigger's pattern, keeps near the received model, and away from the other attackers' direction."""

    boost: float | Literal["auto"] = 3.0
    trigger_epochs: int = 1
    trigger_step: float = 0.1
    trigger_radius: float = 1.0
    pull: float = 0.01
    spread: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.trigger_epochs >= 1, "trigger_epochs", self.trigger_epochs, "must be 1 or more")
        require(self.trigger_step > 0, "trigger_step", self.trigger_step, "must be above 0")
        require(self.trigger_radius >= 0, "trigger_radius", self.trigger_radius, "must be 0 or more")
        require(self.pull >= 0, "pull", self.pull, "must be 0 or more")
        require(self.spread >= 0, "spread", self.spread, "must be 0 or more")

    def adopt(self, trigger: Trigger) -> Tuned:
        """The configured trigger's pattern is what is tuned."""
        return Tuned(trigger, epochs=self.trigger_epochs, step=self.trigger_step, radius=self.trigger_radius)

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        assert ctx.threatening is not None
        lead = ctx.threatening.record.get(LEAD)
        assert lead is None or isinstance(lead, Tensor)
        hook = closeness(ctx.layout, ctx.received, lead, self.pull, self.spread)
        update = super().update(model, samples, hooked(ctx, after_backward=[hook]))
        return replace(update, record={**(update.record or {}), LEAD: update.delta.clone()})
