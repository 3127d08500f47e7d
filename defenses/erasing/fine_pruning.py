"""Fine-pruning (Liu et al., RAID 2018): prune what clean images leave asleep, then fine-tune.

Units of the last feature map are pruned in order of their mean activation over clean images, the least active first,
until the accuracy on held-out clean images has fallen too far; fine-tuning then undoes what a backdoor has woven into
units that the clean task uses.

Deviations: a unit is pruned by zeroing its column in the last layer's weight, which is the same as zeroing its
channel of the last feature map and works on every model; `tolerance` (of the accuracy on a fifth of the clean set) is
0.04, the paper's own stop; the fine-tuning is the shared one, with the pruned columns held at zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_sim.distillation import frozen_copy, with_features
from fl_sim.errors import require
from fl_sim.metrics import CHUNK
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext, State
from fl_sim.pruning import head_weight, masked_logits, scaled, units_to_keep
from fl_sim.samples import Samples
from fl_sim.tuning import Tuning


@torch.no_grad()
def mean_activation(model: Classifier, samples: Samples) -> Tensor:
    """Of each input of the last layer, over the samples; by size, for some architectures' features have a sign."""
    frozen = frozen_copy(model)
    sums = [with_features(frozen, x)[1].abs().sum(0) for x, _ in samples.chunks(CHUNK)]
    return torch.stack(sums).sum(0) / len(samples)


@dataclass(frozen=True)
class FinePruning(Tuning):
    """Prunes the units that clean images activate least, then fine-tunes the rest on the clean set."""

    epochs: int = 20
    min_steps: int = 800
    lr_decay_epochs: int = 4
    tolerance: float = 0.04

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.tolerance < 1, "tolerance", self.tolerance, "must be from 0 to below 1")

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        validation, training = clean.stratified(0.2, ctx.rng)
        order = mean_activation(model, training).argsort()
        columns = {head_weight(model): units_to_keep(model, order, validation, self.tolerance)}

        # A factor of zero also stops a column's gradient, so that what is pruned stays pruned.
        def pruned(student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(masked_logits(student, x, columns), y)

        return self.tuned(scaled(model, columns), training, ctx, ctx.rng, objective=pruned), {}
