"""Contaminated data: an honest client that does not know that its samples are poisoned (the setting of Gu et al. 2017).

It trains as the run's benign client does, at the benign pace and with whatever defense of its own that client has: what
client-side defenses are tested on. Nothing of its update is edited. A learned trigger was learned by whoever
contaminated the data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clients.attacks.data_poisoning import DataPoisoning
from fl_sim.backdoor import PoisonMode
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import Client, ClientContext, Update
from fl_sim.samples import Samples


@dataclass(frozen=True)
class Contaminated:
    """Is honest, its own defense included, but a share `poison_rate` of its samples carries the trigger."""

    client: Client
    poison_rate: float = 0.5
    mode: PoisonMode = "dataset"

    def __post_init__(self) -> None:
        DataPoisoning(self.client, self.poison_rate, self.mode)  # which checks them

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        contaminated, _, record = DataPoisoning(self.client, self.poison_rate, self.mode).poisoned(model, samples, ctx)
        return replace(self.client.update(model, contaminated, ctx), record=record)
