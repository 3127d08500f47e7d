"""Fine-tuning on the clean set: the control that stands beside every distillation."""

from __future__ import annotations

from dataclasses import dataclass

from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext, State
from fl_sim.samples import Samples
from fl_sim.tuning import Tuning


@dataclass(frozen=True)
class FineTune(Tuning):
    """Trains all layers on the clean set, by default for as many steps as NAD's teacher and student together."""

    epochs: int = 20
    min_steps: int = 800
    lr_decay_epochs: int = 4

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        return self.tuned(model, clean, ctx, ctx.rng), {}
