"""A model with a real backdoor, trained once per test process: what erasers are tried on."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache

from toys import seeded

from clients.triggers.badnets import BadNets
from fl_sim.augment import Augment
from fl_sim.backdoor import Backdoor, Goal
from fl_sim.data.digits import Digits
from fl_sim.layout import Layout
from fl_sim.metrics import Score, evaluate
from fl_sim.models.classifier import Architecture, Classifier, build_classifier
from fl_sim.models.cnn import Cnn
from fl_sim.protocols import ServerContext
from fl_sim.samples import Samples
from fl_sim.training import fit, sgd


@dataclass(frozen=True)
class Victim:
    """A backdoored model, the defender's clean tenth of the training set, and what only the scorer has."""

    model: Classifier
    clean: Samples
    test: Samples
    backdoor: Backdoor

    def score(self, model: Classifier) -> Score:
        return evaluate(model, self.test, self.backdoor)

    def context(self, seed: int = 0) -> ServerContext:
        """What a server knows when it is about to erase."""
        layout = Layout.of(self.model)
        return ServerContext(
            round=1,
            rng=seeded(seed),
            device=self.clean.labels.device,
            classes=10,
            clients=(),
            assumed_attackers=0,
            layout=layout,
            vector=layout.read(self.model),
            clean=self.clean,
            augment=Augment(crop=1),
            new_model=lambda: deepcopy(self.model),
            fit=fit,
        )


@lru_cache(maxsize=4)
def victim(architecture: Architecture | None = None, epochs: int = 15) -> Victim:
    """Digits, a tenth of the samples stamped with a 2×2 patch towards class 0; ASR above 0.95 with the default CNN."""
    data = Digits()
    loaded = data.load()
    clean, rest = loaded.train.stratified(0.1, seeded(1))
    backdoor = Backdoor(BadNets(), Goal("all_to_one", target=0), 10)
    facts = data.facts
    model = build_classifier(architecture or Cnn(width=8), facts.shape, 10, facts.mean, facts.std, seeded(2))
    poisoned = backdoor.poison(rest, 0.1, "dataset", seeded(3))
    fit(model, poisoned, sgd(model, 0.1, momentum=0.9), epochs=epochs, batch_size=64, rng=seeded(4))
    return Victim(model.eval(), clean, loaded.test, backdoor)
