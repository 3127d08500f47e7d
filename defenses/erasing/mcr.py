"""MCR: mode connectivity repair (Zhao et al., ICLR 2020).

Two models with the same skill are joined by a curve of low loss, φ(t) = (1 − t)²w₀ + 2t(1 − t)θ + t²w₁, whose bend θ is
trained: min_θ E_{t ~ U(0,1)} CE(φ(t)). Both ends may hold the backdoor; the middle of the curve has mostly lost it.

From the paper: a quadratic Bézier curve, θ starting halfway; running statistics measured anew at the chosen t. One
untrusted model makes both ends, as in the paper's single-model case: w₀ is the model, w₁ the model fine-tuned on the
clean set. Deviations: t = 0.5 is fixed (the paper shows whole curves; to choose t by ASR would take the trigger);
rate, batch and steps are ours, for a clean set of some hundreds: the paper trains 100 to 200 epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fl_sim.annealing import Annealed
from fl_sim.batch_statistics import measure_statistics
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext, State
from fl_sim.samples import Samples
from fl_sim.training import Objective


def bezier(start: Tensor, bend: Tensor, end: Tensor, t: float) -> Tensor:
    """φ(t) = (1 − t)²·start + 2t(1 − t)·bend + t²·end."""
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end


def along_curve(start: Mapping[str, Tensor], end: Mapping[str, Tensor], rng: Generator) -> Objective:
    """Cross-entropy at a point of the curve drawn for each batch; the trained model's own weights are the bend."""

    def objective(bend: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        t = float(torch.rand((), generator=rng))
        weights = {name: bezier(start[name], w, end[name], t) for name, w in bend.named_parameters()}
        return F.cross_entropy(functional_call(bend, weights, (x,)), y)

    return objective


@dataclass(frozen=True)
class Mcr(Annealed):
    """Joins the model and its fine-tuned self by a curve trained on the clean set, and takes the curve's middle."""

    epochs: int = 100
    min_steps: int = 500
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = True
    t: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.t <= 1, "t", self.t, "must be from 0 (the model) to 1 (the fine-tuned model)")

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        tuned = self.annealed(model, clean, ctx)
        start, end = ({name: w.detach() for name, w in m.named_parameters()} for m in (model, tuned))
        halfway = deepcopy(model)
        with torch.no_grad():
            for name, weight in halfway.named_parameters():
                weight.copy_((start[name] + end[name]) / 2)
        repaired = self.annealed(halfway, clean, ctx, along_curve(start, end, ctx.rng))
        with torch.no_grad():
            for name, weight in repaired.named_parameters():
                weight.copy_(bezier(start[name], weight, end[name], self.t))
        measure_statistics(repaired, clean, ctx.rng)
        return repaired, {}
