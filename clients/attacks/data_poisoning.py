"""Data poisoning: honest training on stamped data (Gu et al. 2017; federated: Bagdasaryan et al., AISTATS 2020)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fl_sim.backdoor import Backdoor, PoisonMode
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import Client, ClientContext, Learned, State, Update
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

    @property
    def trainer(self) -> Client:
        """How the attacker trains: as a benign client at its own pace, without that client's own defense."""
        return own_pace(getattr(self.client, "undefended", self.client), self.epochs, self.lr)

    def poisoned(
        self, model: Classifier, samples: Samples, ctx: ClientContext
    ) -> tuple[Samples, Backdoor, State | None]:
        """The attacker's samples, the backdoor they carry, and what its trigger learned, if it is one that learns."""
        assert ctx.threatening is not None
        backdoor = ctx.threatening.backdoor
        shop = ctx.workshop(model) if backdoor.needs_workshop else None
        record: State | None = None
        if shop is not None and isinstance(backdoor.trigger, Learned):
            record = backdoor.trigger.learn(samples, shop)
            backdoor = backdoor.recalling(record)
        return backdoor.poison(samples, self.poison_rate, self.mode, ctx.rng, shop), backdoor, record

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        poisoned, _, record = self.poisoned(model, samples, ctx)
        return replace(self.trainer.update(model, poisoned, ctx), record=record)
