"""SCALE-UP (Guo et al., ICLR 2023): what a trigger has decided stays decided when all pixels are amplified.

    SPC(x) = 1/|S| · Σ_{n ∈ S} [C(clip(n·x)) = C(x)],   S = {3, 5, 7, 9, 11}: the data-free form
    (SPC(x) − μ_{C(x)}) / σ_{C(x)}: the data-limited form, μ_i and σ_i over the clean images of class i

C answers with labels only, so the model is a black box. Deviations: σ is at least 1/(|S|·√12), the rounding error of a
share of |S| answers, because few clean images of a class may agree; a class without clean images takes μ and σ of all.
Pixels that are 0 stay 0, however much they are amplified: on bright strokes before black the method's assumption, that
clean answers change, is weak.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_sim.errors import require
from fl_sim.metrics import CHUNK
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import Screen, ServerContext, State
from fl_sim.samples import Samples


@torch.no_grad()
def consistency(model: Classifier, x: Tensor, factors: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """SPC and the answer for each image [N]."""
    answers = model(x).argmax(1)
    same = [model((factor * x).clamp(0, 1)).argmax(1) == answers for factor in factors]
    return torch.stack(same).float().mean(0), answers


def by_class(shares: Tensor, labels: Tensor, classes: int, least: float) -> tuple[Tensor, Tensor]:
    """μ and σ [classes] of the clean images' shares by their true class; σ is at least `least`."""
    groups = [shares[labels == label] for label in range(classes)]
    groups = [group if len(group) else shares for group in groups]
    middle = torch.stack([group.mean() for group in groups])
    return middle, torch.stack([group.std(correction=0) for group in groups]).clamp(min=least)


@dataclass(frozen=True)
class ScaleUp:
    """Amplifies an image's pixels and counts how often the prediction stays what it was."""

    factors: tuple[float, ...] = (3, 5, 7, 9, 11)
    normalise: bool = True

    def __post_init__(self) -> None:
        good = bool(self.factors) and all(factor > 0 for factor in self.factors)
        require(good, "factors", list(self.factors), "must be one or more numbers above 0")

    @property
    def needs_clean(self) -> bool:
        """Only the data-limited form does."""
        return self.normalise

    def screen(self, model: Classifier, state: State, ctx: ServerContext) -> Screen:
        if not self.normalise:
            return Screen(lambda x: consistency(model, x, self.factors)[0])
        assert ctx.clean is not None
        middle, spread = self._usual(model, ctx.clean, ctx.classes)

        def score(x: Tensor) -> Tensor:
            share, answers = consistency(model, x, self.factors)
            return (share - middle[answers]) / spread[answers]

        return Screen(score)

    def _usual(self, model: Classifier, clean: Samples, classes: int) -> tuple[Tensor, Tensor]:
        shares = torch.cat([consistency(model, x, self.factors)[0] for x, _ in clean.chunks(CHUNK)])
        return by_class(shares, clean.labels, classes, 1 / (len(self.factors) * 12**0.5))
