"""Semantic backdoor (Bagdasaryan et al., AISTATS 2020): a natural feature of some images is the trigger.

    an image of the source class carries it if feature(x) ≥ q,   q: the (1 − share)-quantile of the attacker's own

Nothing is stamped: the attacker relabels those of its own images that have the feature, and the scorer asks for the
target on the test images that have it. The paper's features (green cars, racing stripes) need labels that data sets
lack; ours are measured: how red an image is, or how bright. The threshold is learned from the first attacker's own
images of the source class and travels in the record; until then all images of that class count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from clients.triggers.drawing import holding
from fl_sim.backdoor import Rule
from fl_sim.errors import require
from fl_sim.protocols import State, Workshop
from fl_sim.samples import Samples, to_pixels


def brightness(x: Tensor) -> Tensor:
    """The mean over each image [N]."""
    return x.mean((1, 2, 3))


def redness(x: Tensor) -> Tensor:
    """How much more red than green and blue each image is, on the mean [N]."""
    return (x[:, 0] - (x[:, 1] + x[:, 2]) / 2).mean((1, 2))


@dataclass(frozen=True)
class Semantic:
    """Nothing is stamped: those images of the source class that are reddest (or brightest) become the target.

    `auto`: redness of colour images, brightness of grey ones.
    """

    uses_model: ClassVar[bool] = False
    rule: ClassVar[Rule] = "source_specific"
    feature: Literal["auto", "redness", "brightness"] = "auto"
    share: float = 0.1
    threshold: float | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share", self.share, "must be a fraction above 0")

    def check(self, shape: tuple[int, int, int]) -> None:
        require(self.feature != "redness" or shape[0] == 3, "feature", self.feature, "needs colour images")

    def measured(self, x: Tensor) -> Tensor:
        red = self.feature == "redness" or (self.feature == "auto" and x.shape[1] == 3)
        return redness(x) if red else brightness(x)

    def __call__(self, x: Tensor) -> Tensor:
        return x.clone()

    def selects(self, x: Tensor) -> Tensor:
        return self.measured(x) >= (float("-inf") if self.threshold is None else self.threshold)

    def learn(self, samples: Samples, workshop: Workshop) -> State:
        """The first attacker's threshold is everybody's; without images of the source class, that of all its images."""
        if workshop.record:
            return workshop.record
        own = samples.labels == workshop.goal.source
        images = samples.images[own] if bool(own.any()) else samples.images
        return {"threshold": float(self.measured(to_pixels(images)).quantile(1 - self.share))}

    def recall(self, record: State) -> Semantic:
        return holding(self, threshold=float(record["threshold"]))
