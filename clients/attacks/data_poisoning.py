"""Data poisoning: honest training on stamped data (Gu et al. 2017; federated: Bagdasaryan et al., AISTATS 2020)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fl_sim.backdoor import PoisonMode
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import Client, ClientContext, Update
from fl_sim.samples import Samples


def own_pace(client: Client, epochs: int | None, lr: float | None) -> Client:
    """The benign client with the attacker's own epochs and learning rate, where given."""
    changes: dict[str, float] = {}
    if epochs is not None:
        require(epochs >= 1, "epochs", epochs, "must be 1 or more")
        changes["epochs"] = epochs
    if lr is not None:
        require(lr > 0, "lr", lr, "must be above 0")
        changes["lr"] = lr
    return replace(client, **changes) if changes else client  # type: ignore[type-var]


@dataclass(frozen=True)
class DataPoisoning:
    """Trains as the benign client does, on samples of which `poison_rate` carry the trigger."""

    client: Client
    poison_rate: float = 0.5
    mode: PoisonMode = "dataset"
    epochs: int | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        require(0 <= self.poison_rate <= 1, "poison_rate", self.poison_rate, "must be a fraction from 0 to 1")
        own_pace(self.client, self.epochs, self.lr)

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        assert ctx.threatening is not None
        poisoned = ctx.threatening.backdoor.poison(samples, self.poison_rate, self.mode, ctx.rng)
        return own_pace(self.client, self.epochs, self.lr).update(model, poisoned, ctx)
