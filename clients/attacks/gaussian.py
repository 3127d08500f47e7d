"""The Gaussian attack (Blanchard et al., NeurIPS 2017): noise in place of an update.

Δ ~ N(0, σ²I) on the parameters. The paper's σ = 200 is of no use without the model's scale: here σ = `scale` ·
‖Δ_honest‖/√P, so that the noise is about `scale` times as long as an honest update, and may be added to it instead
(`add`). Batch statistics are honest. There is no backdoor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from clients.attacks.hooked import honest_update
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import Client, ClientContext, Update
from fl_sim.samples import Samples


@dataclass(frozen=True)
class Gaussian:
    """Sends Gaussian noise `scale` times as long as its honest update would be, or adds it to that."""

    client: Client
    scale: float = 3.0
    add: bool = False

    def __post_init__(self) -> None:
        require(self.scale > 0, "scale", self.scale, "must be above 0")

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        update, split = honest_update(self.client, model, samples, ctx), ctx.layout.parameters
        delta = update.delta.clone()
        noise = torch.randn(split, generator=ctx.rng).to(delta.device)
        noise *= self.scale * delta[:split].norm() / math.sqrt(split)
        delta[:split] = delta[:split] + noise if self.add else noise
        return replace(update, delta=delta)
