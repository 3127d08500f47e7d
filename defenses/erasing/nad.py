"""Neural Attention Distillation (Li et al., ICLR 2021), run at the server.

A teacher, the model fine-tuned on the clean set, shows a student, the model itself, where to look:
L = CE(student(x), y) + Σ_l β_l · d(Â_S^l, Â_T^l), Â = Σ_c F_c² flattened and divided by its L2 norm.

From the paper: clean subset of 5 %, 10 epochs, SGD 0.1 divided by 10 every 2 epochs, momentum 0.9, weight decay 1e-4,
batch 64. Deviations: d is the *squared* L2 distance with β = 0.5/4/16, which equals the official code's mean squared
error with β = 500/1000/1000 on 32×32 images (β/(H·W)) and keeps its weight on any other size; `min_steps` stretches
the schedule over clean sets of a few hundred images; Cutout is left to `data.augment`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fl_sim.attention import Distance, distillation
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext, State
from fl_sim.samples import Samples
from fl_sim.tuning import Tuning


@dataclass(frozen=True)
class Nad(Tuning):
    """Fine-tunes a teacher on the clean set, then distils its attention into the model.

    `weights` go to the taps in order; a model with more taps repeats the last.
    """

    teacher_epochs: int = 10
    weights: tuple[float, ...] = (0.5, 4.0, 16.0)
    distance: Distance = "squared"
    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.teacher_epochs >= 1, "teacher_epochs", self.teacher_epochs, "must be 1 or more")
        usable = bool(self.weights) and all(weight >= 0 for weight in self.weights)
        require(usable, "weights", list(self.weights), "must be a list of one or more numbers, none below 0")
        # Below 1 the map has no finite gradient where a feature is zero, as a ReLU's often is.
        require(self.power >= 1, "power", self.power, "must be 1 or more")

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        teacher = self.tuned(model, clean, ctx, ctx.rng, epochs=self.teacher_epochs)
        objective = distillation(teacher, self.weights, self.distance, self.power)
        return self.tuned(model, clean, ctx, ctx.rng, objective=objective), {}
