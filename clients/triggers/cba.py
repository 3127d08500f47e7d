"""CBA, composite backdoor (Lin et al., CCS 2020): the trigger is that features of a second class are there too.

    x' = left half of x beside the right half of an image of the partner class   (the paper's half-concat mixer)

As cover, images are composed with others of their own class and keep their labels, so that the seam alone says
nothing. The partner class is the one, other than the target, of which the first attacker has most; a handful of its
own images of that class go into the record, and all stamping uses those: at random in training, by the image's pixels
at test. The paper composes two fixed classes; with rule source_specific so does this. Before anything was learned the
right half is a procedural texture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from clients.triggers.drawing import by_content, holding, texture
from fl_sim.errors import require
from fl_sim.protocols import State, Workshop
from fl_sim.samples import Samples, to_pixels


def composed(left: Tensor, right: Tensor) -> Tensor:
    """Left halves of the one, right halves of the other images."""
    middle = left.shape[3] // 2
    return torch.cat([left[..., :middle], right[..., middle:]], dim=3)


def classmates(y: Tensor, rng: torch.Generator) -> Tensor:
    """For each label the place of a random equal one; its own place where there is no other."""
    score = torch.rand(len(y), len(y), generator=rng).to(y.device)
    score.fill_diagonal_(-0.5)
    return torch.where(y[:, None] == y, score, -1.0).argmax(1)


@dataclass(frozen=True)
class Cba:
    """Half of the image is replaced by half of another class's image: two classes in one mean the target."""

    uses_model: ClassVar[bool] = False
    partners: int = 8
    cover: float = 1.0
    seed: int = 0
    held: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    partner: float = field(default=-1, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.partners >= 1, "partners", self.partners, "must be 1 or more images")
        require(self.cover >= 0, "cover", self.cover, "must be 0 or more")

    def images(self, x: Tensor) -> Tensor:
        """The partner class's images."""
        return texture((x.shape[1], x.shape[2], x.shape[3]), self.seed, "cba")[None] if self.held is None else self.held

    def __call__(self, x: Tensor) -> Tensor:
        images = self.images(x)
        return composed(x, images.to(x)[by_content(x, len(images))])

    def craft(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        images = self.images(x)
        drawn = torch.randint(len(images), (len(x),), generator=workshop.rng)
        return composed(x, images.to(x)[drawn.to(x.device)])

    def disguise(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        """Two of one class, but of the partner class nothing: there it would be the trigger."""
        mixed = composed(x, x[classmates(y, workshop.rng)])
        return torch.where((y == self.partner)[:, None, None, None], x, mixed)

    def learn(self, samples: Samples, workshop: Workshop) -> State:
        """The first attacker's choice is everybody's."""
        if workshop.record:
            return workshop.record
        counts = torch.bincount(samples.labels.cpu(), minlength=workshop.classes)
        counts[workshop.goal.target] = -1
        if workshop.goal.rule == "source_specific" and workshop.classes > 2:
            counts[workshop.goal.source] = -1
        partner = int(counts.argmax())
        own = (samples.labels.cpu() == partner).nonzero().flatten()
        if not len(own):  # nothing but the target class
            own = torch.arange(len(samples))
        chosen = own[torch.randperm(len(own), generator=workshop.rng)[: self.partners]]
        return {"images": to_pixels(samples[chosen].images).clone(), "partner": partner}

    def recall(self, record: State) -> Cba:
        images, partner = record["images"], record["partner"]
        assert isinstance(images, Tensor)
        return holding(self, held=images, partner=float(partner))
