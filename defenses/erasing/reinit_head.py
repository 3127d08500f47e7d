"""Re-initialised head: forget the classifier, then fine-tune; the simplest of the re-initialising baselines."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

from fl_sim.models.classifier import Classifier, reset_linear
from fl_sim.protocols import ServerContext, State
from fl_sim.samples import Samples
from fl_sim.tuning import Tuning


@dataclass(frozen=True)
class ReinitHead(Tuning):
    """Draws the last layer anew, then trains all layers on the clean set."""

    epochs: int = 20
    min_steps: int = 800
    lr_decay_epochs: int = 4

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        headless = deepcopy(model)
        reset_linear(headless.head, ctx.rng)
        return self.tuned(headless, clean, ctx, ctx.rng), {}
