"""Label flipping (Tolpegin et al., ESORICS 2020): honest training on images with wrong labels; there is no trigger.

`pair`: images of the backdoor's source class are called its target (the paper's attack). `all`: class y is called
y + 1, so that no class keeps its name (untargeted). `poison_rate` is the share of the images concerned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from clients.attacks.model_replacement import ModelReplacement
from fl_sim.backdoor import Backdoor, Goal
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, State
from fl_sim.samples import Samples


def untouched(x: Tensor) -> Tensor:
    """The trigger of an attack that has none."""
    return x


@dataclass(frozen=True)
class LabelFlip(ModelReplacement):
    """Trains on images with wrong labels: all classes shifted by one, or the source class called the target."""

    stamps: ClassVar[bool] = False
    """No image carries a trigger."""

    poison_rate: float = 1.0
    boost: float | Literal["auto"] = 1.0
    flip: Literal["all", "pair"] = "all"

    def own_goal(self, goal: Goal) -> Goal:
        """Which labels are wrong, whatever the configured rule is."""
        return replace(goal, rule="all_to_all" if self.flip == "all" else "source_specific")

    def check_goal(self, goal: Goal, classes: int) -> None:
        self.own_goal(goal).check(classes)

    def poisoned(
        self, model: Classifier, samples: Samples, ctx: ClientContext
    ) -> tuple[Samples, Backdoor, State | None]:
        assert ctx.threatening is not None
        known = ctx.threatening.backdoor
        goal = self.own_goal(known.goal)
        flipped = Backdoor(untouched, goal, ctx.classes).poison(samples, self.poison_rate, self.mode, ctx.rng)
        return flipped, known, None
