"""FT-SAM: fine-tuning with adaptive sharpness-aware minimisation (Zhu et al., ICCV 2023).

Plain fine-tuning moves the weights of backdoor neurons little; searching a flat minimum moves the large ones:
min_w max_{‖T⁻¹ε‖ ≤ ρ} CE(w + ε), T = diag|w|, solved to first order by ε = ρ · T²g / ‖Tg‖ with g = ∇CE(w); the step
uses the gradient at w + ε.

From the official code: ρ = 2, SGD 0.01 with a cosine schedule, momentum 0.9, weight decay 5e-4, batch 256, 100 epochs;
the second pass leaves the running statistics alone. Deviation: `min_steps`, 1,000 as on the paper's 2,500 images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_sim.annealing import Annealed
from fl_sim.batch_statistics import frozen_statistics
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext, State
from fl_sim.samples import Samples
from fl_sim.training import Objective, cross_entropy


def sharpest(weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float, adaptive: bool) -> list[Tensor]:
    """ε = ρ · T²g / ‖Tg‖ over all tensors together; T = |w|, or the identity (plain SAM)."""
    scaled = [w.abs() * g if adaptive else g for w, g in zip(weights, gradients, strict=True)]
    norm = torch.stack([each.norm() for each in scaled]).norm() + 1e-12
    return [(w.abs() * s if adaptive else s) * (rho / norm) for w, s in zip(weights, scaled, strict=True)]


def sharpness_aware(rho: float, adaptive: bool) -> Objective:
    """A scalar with the value of the cross-entropy at w and the gradient of the cross-entropy at w + ε."""

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = cross_entropy(model, x, y)
        steps = sharpest([w.detach() for w in weights], torch.autograd.grad(loss, weights), rho, adaptive)
        kept = [w.detach().clone() for w in weights]  # adding and subtracting ε would not give back the same bits
        with torch.no_grad():
            for weight, step in zip(weights, steps, strict=True):
                weight.add_(step)
        with frozen_statistics(model):
            gradients = torch.autograd.grad(cross_entropy(model, x, y), weights)
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)
        # g·(w − w₀) is zero at w = w₀, and its gradient is g: `fit` steps by it like by any other loss.
        linear = torch.stack([(g * (w - k)).sum() for g, w, k in zip(gradients, weights, kept, strict=True)])
        return loss.detach() + linear.sum()

    return objective


@dataclass(frozen=True)
class FtSam(Annealed):
    """Fine-tunes towards a flat minimum, with perturbations in proportion to each weight's size."""

    rho: float = 2.0
    adaptive: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rho >= 0, "rho", self.rho, "must be 0 or more")

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        return self.annealed(model, clean, ctx, sharpness_aware(self.rho, self.adaptive)), {}
