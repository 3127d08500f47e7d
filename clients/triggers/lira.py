"""LIRA (Doan et al., ICCV 2021): a generator makes invisible noise for each image, learned together with the model.

    T(x) = clip(x + ε·tanh(G(x))),   min over G of CE(f(T(x)), target);   the classifier: α·clean + β·stamped

The paper alternates the two within one training. Here they alternate over the attacks: G learns against the model that
was received, then the attack trains on the stamped images (α and β are its poison rate). The paper's ε on 32×32
images is 0.01 after hundreds of epochs; `auto` is 0.05 there, more on smaller images. A large ε makes G an adversarial
attack, which needs no backdoor: compare with what the trigger does to a clean model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.triggers.drawing import at_size
from clients.triggers.generator import Painted, Painter
from fl_sim.errors import require
from fl_sim.protocols import Workshop
from fl_sim.samples import Samples
from fl_sim.training import Objective


def wanted_entropy(stamped: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
    """How far the received model is from taking stamped images of classes `y` for what the attacker wants."""
    return F.cross_entropy(workshop.model(stamped), workshop.goal.labels(y, workshop.classes))


@dataclass(frozen=True)
class Lira(Painted):
    """Noise of at most `epsilon` that a generator paints for each image, learned against the received model."""

    epsilon: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        usable = self.epsilon == "auto" or 0 < self.epsilon <= 1
        require(usable, "epsilon", self.epsilon, "must be auto or above 0, up to 1")

    def painted(self, painter: Painter, x: Tensor) -> Tensor:
        bound = at_size(0.05, x) if self.epsilon == "auto" else self.epsilon
        return (x + bound * torch.tanh(painter(x))).clamp(0, 1)

    def objective(self, samples: Samples, workshop: Workshop) -> Objective:
        def loss(painter: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            assert isinstance(painter, Painter)
            return wanted_entropy(self.painted(painter, x), y, workshop)

        return loss
