"""ℓ∞ neuron pruning (Cheng et al., 2020): backdoor neurons show in the peaks of their maps, not in the means.

A trigger is reverse-engineered for the class that needs the smallest one. Each channel k of the last feature map is
scored by the mean over probes of ‖A_k‖_p, p = ∞; the probe is the gap A_k(stamped) − A_k(clean) of the clean images
with and without that trigger. Channels are pruned in descending order until the accuracy on held-out clean images
falls by more than `tolerance`.

Reconstruction: the paper's abstract fixes the ℓ∞ norm, the synthetic trigger and the last convolutional layer. Ours
are the gap as a probe (`probe`: gap, trigger, clean; `norm`: inf, l1, l2 for comparison), the stopping rule, and that
a channel is pruned by zeroing its column in the last layer's weight, which equals zeroing its map. No fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fl_sim.distillation import frozen_copy
from fl_sim.errors import require
from fl_sim.inversion import Inversion, Stamp
from fl_sim.metrics import CHUNK
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext, State
from fl_sim.pruning import head_weight, last_map, require_last_map, scaled, units_to_keep
from fl_sim.samples import Samples

Probe = Literal["gap", "trigger", "clean"]
Norm = Literal["inf", "l1", "l2"]
ORDERS = {"inf": torch.inf, "l1": 1.0, "l2": 2.0}


def channel_norms(maps: Tensor, norm: Norm) -> Tensor:
    """‖A_k‖_p of each sample's channels: [B, C, H, W] -> [B, C]; ∞ is the largest size of any position."""
    norms: Tensor = torch.linalg.vector_norm(maps.flatten(2), ord=ORDERS[norm], dim=2)
    return norms


@torch.no_grad()
def scores(model: Classifier, samples: Samples, stamp: Stamp, probe: Probe, norm: Norm) -> Tensor:
    """Each channel's mean norm over the probes."""
    frozen = frozen_copy(model)
    total = torch.zeros(model.head.in_features, device=samples.labels.device)
    for x, _ in samples.chunks(CHUNK):
        maps = last_map(frozen, x if probe == "clean" else stamp(x))
        if probe == "gap":
            maps = maps - last_map(frozen, x)
        total += channel_norms(maps, norm).sum(0)
    return total / len(samples)


@dataclass(frozen=True)
class Linf:
    """Prunes the channels that a reverse-engineered trigger drives to the highest peaks."""

    probe: Probe = "gap"
    norm: Norm = "inf"
    tolerance: float = 0.02
    inversion: Inversion = field(default_factory=Inversion)

    def __post_init__(self) -> None:
        require(0 <= self.tolerance < 1, "tolerance", self.tolerance, "must be from 0 to below 1")

    def check_model(self, model: Classifier) -> None:
        require_last_map(model)

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        self.check_model(model)
        validation, training = clean.stratified(0.2, ctx.rng)
        found = self.inversion.invert(model, training, ctx.classes, ctx.rng)
        order = scores(model, training, found.stamp(found.suspect), self.probe, self.norm).argsort(descending=True)
        return scaled(model, {head_weight(model): units_to_keep(model, order, validation, self.tolerance)}), {}
