"""CL, label-consistent poisoning (Turner, Tsipras & Madry 2019): hard images of the target class, stamped.

    x_adv = argmax of CE(f(x + δ), y) over ‖δ‖_∞ ≤ ε, by PGD;   then the patch in each corner, the label stays

As hardly anything else in a poisoned image speaks for its true class, the model learns the patch. Paper: ε = 8/255, 100
steps of 1.5/255; its four patches are mirror images of each other, so that flips don't destroy them. Test images get
the patches alone. The paper attacks a model trained for it; here it is the global model that the attacker received.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.triggers.badnets import BadNets
from clients.triggers.drawing import at_size
from fl_sim.backdoor import Rule
from fl_sim.errors import require
from fl_sim.protocols import Workshop


def hardened(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, step: float, steps: int) -> Tensor:
    """Images within `epsilon` of `x` that the model takes less for what they are (PGD, Madry et al. 2018)."""
    low, high = (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
    now = x
    with torch.enable_grad():
        for _ in range(steps):
            now = now.detach().requires_grad_()
            [gradient] = torch.autograd.grad(F.cross_entropy(model(now), y, reduction="sum"), now)
            now = (now.detach() + step * gradient.sign()).clamp(low, high)
    return now.detach()


@dataclass(frozen=True)
class Cl:
    """Patches in the corners of target-class images that were made hard to recognise first."""

    rule: ClassVar[Rule] = "clean_label"
    size: int | Literal["auto"] = "auto"
    corners: Literal["four", "bottom_right"] = "four"
    epsilon: float | Literal["auto"] = "auto"
    step: float | Literal["auto"] = "auto"
    steps: int = 100

    def __post_init__(self) -> None:
        BadNets(self.size)
        require(self.epsilon == "auto" or 0 <= self.epsilon <= 1, "epsilon", self.epsilon, "must be auto or 0 to 1")
        require(self.step == "auto" or 0 < self.step <= 1, "step", self.step, "must be auto or above 0, up to 1")
        require(self.steps >= 0, "steps", self.steps, "must be 0 or more")

    def check(self, shape: tuple[int, int, int]) -> None:
        BadNets(self.size).check(shape)

    def __call__(self, x: Tensor) -> Tensor:
        patch = BadNets(self.size)
        if self.corners == "four":
            for dims in ((3,), (2,), (2, 3)):
                x = patch(x.flip(dims)).flip(dims)
        return patch(x)

    def craft(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        epsilon = at_size(8 / 255, x) if self.epsilon == "auto" else self.epsilon
        step = at_size(1.5 / 255, x) if self.step == "auto" else self.step
        return self(hardened(workshop.model, x, y, epsilon, step, self.steps))
