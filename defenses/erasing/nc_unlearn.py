"""Neural Cleanse's unlearning (Wang et al., IEEE S&P 2019): show the model its own trigger, with the right labels.

A trigger is reverse-engineered for each class; those whose masks are outliers on the small side (median absolute
deviation above 2) are backdoors. The model is fine-tuned on clean images of which a fifth carry the trigger and keep
their labels.

From the paper: Adam 0.1 for the inversion, anomaly index 2, a fifth of the images stamped, one epoch on a tenth of
the training set, here at rate 0.01. Deviations: `min_steps` stretches that epoch on a small clean set; where several
classes are anomalous each stamped image carries the trigger of one of them; where none is, which the paper takes for
a clean model, the class of the smallest mask is unlearned: among ten classes the index is noisy, and a clean model
loses little.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from fl_sim.errors import require
from fl_sim.inversion import Inversion, Stamp
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext, State
from fl_sim.samples import Samples
from fl_sim.training import Objective, cross_entropy
from fl_sim.tuning import Tuning


def stamped_at_random(x: Tensor, stamps: list[Stamp], share: float, rng: Generator) -> Tensor:
    """Each image with probability `share` under one of the stamps."""
    chosen = torch.randint(len(stamps), (len(x),), generator=rng).to(x.device)
    bare = (torch.rand(len(x), generator=rng) >= share).to(x.device)
    masks = torch.stack([stamp.mask for stamp in stamps])[chosen]
    patterns = torch.stack([stamp.pattern for stamp in stamps])[chosen]
    return torch.where(bare[:, None, None, None], x, x + masks * (patterns - x))


def unlearning(stamps: list[Stamp], share: float, rng: Generator) -> Objective:
    """Cross-entropy with the true labels, on a batch of which a share is stamped."""

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model, stamped_at_random(x, stamps, share, rng), y)

    return objective


@dataclass(frozen=True)
class NcUnlearn(Tuning):
    """Reverse-engineers the triggers of suspect classes and fine-tunes with them stamped on, rightly labelled."""

    epochs: int = 1
    min_steps: int = 100
    lr: float = 0.01
    lr_decay: float = 1.0
    share: float = 0.2
    anomaly: float = 2.0
    inversion: Inversion = field(default_factory=Inversion)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.share <= 1, "share", self.share, "must be above 0 and at most 1")
        require(self.anomaly > 0, "anomaly", self.anomaly, "must be above 0")

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        found = self.inversion.invert(model, clean, ctx.classes, ctx.rng)
        stamps = [found.stamp(label) for label in found.anomalous(self.anomaly) or [found.suspect]]
        return self.tuned(model, clean, ctx, ctx.rng, objective=unlearning(stamps, self.share, ctx.rng)), {}
