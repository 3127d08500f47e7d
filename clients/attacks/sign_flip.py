"""Sign flipping (Li et al., AAAI 2019, "RSA"): an honest update with its sign turned.

Δ = −σ · Δ_honest on the parameters; batch statistics are honest. There is no backdoor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clients.attacks.hooked import honest_update
from clients.attacks.model_replacement import boosted
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import Client, ClientContext, Update
from fl_sim.samples import Samples


@dataclass(frozen=True)
class SignFlip:
    """Sends −`scale` times the update that it would send if it were honest."""

    client: Client
    scale: float = 3.0

    def __post_init__(self) -> None:
        require(self.scale > 0, "scale", self.scale, "must be above 0")

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        update = honest_update(self.client, model, samples, ctx)
        return replace(update, delta=boosted(update.delta, -self.scale, ctx.layout))
