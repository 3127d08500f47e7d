"""A backdoor: a trigger, the rule that says what stamped images shall become, and a target class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Generator, Tensor

from fl_sim.errors import require
from fl_sim.protocols import Trigger
from fl_sim.samples import Samples, like, to_pixels

Rule: TypeAlias = Literal["all_to_one", "all_to_all", "source_specific", "clean_label"]
PoisonMode: TypeAlias = Literal["dataset", "per_batch"]


@dataclass(frozen=True)
class Goal:
    """Which images a backdoor is after, and what they shall be taken for.

    all_to_one       every class becomes the target
    all_to_all       class y becomes y + 1
    source_specific  images of the source class become the target
    clean_label      as all_to_one when attacking; only target-class images are poisoned, their labels are true
    """

    rule: Rule = "all_to_one"
    target: int = 0
    source: int = 1

    def check(self, classes: int) -> None:
        require(0 <= self.target < classes, "target", self.target, f"must be a class from 0 to {classes - 1}")
        require(0 <= self.source < classes, "source", self.source, f"must be a class from 0 to {classes - 1}")
        distinct = self.rule != "source_specific" or self.source != self.target
        require(distinct, "source", self.source, "must differ from the target class")

    def labels(self, y: Tensor, classes: int) -> Tensor:
        """What stamped images of classes `y` shall be taken for."""
        return (y + 1) % classes if self.rule == "all_to_all" else torch.full_like(y, self.target)

    def victims(self, y: Tensor) -> Tensor:
        """Which test images count for the attack's success: never those that are of the wanted class already."""
        if self.rule == "all_to_all":
            return torch.ones_like(y, dtype=torch.bool)
        return y == self.source if self.rule == "source_specific" else y != self.target

    def poisonable(self, y: Tensor) -> Tensor:
        """Which training images may be stamped."""
        if self.rule == "clean_label":
            return y == self.target
        return y == self.source if self.rule == "source_specific" else torch.ones_like(y, dtype=torch.bool)


@dataclass(frozen=True)
class Backdoor:
    """What an attacker implants, and what the scorer measures."""

    trigger: Trigger
    goal: Goal
    classes: int

    def stamp(self, pixels: Tensor) -> Tensor:
        """The trigger on a batch of pixels in [0, 1]; the input is left alone."""
        return self.trigger(pixels).clamp(0, 1)

    def poison(self, samples: Samples, rate: float, mode: PoisonMode, rng: Generator) -> Samples:
        """Training samples of which a share `rate` is stamped and relabelled.

        dataset    a fixed share of the samples, drawn once; augmentation comes after the stamp
        per_batch  the first `rate` of each shuffled batch, after augmentation
        Where the rule admits only one class, the rate is that of the admitted samples.
        """
        if mode == "per_batch":

            def transform(x: Tensor, y: Tensor, _rng: Generator) -> tuple[Tensor, Tensor]:
                allowed = self.goal.poisonable(y).nonzero().flatten()
                return self._stamp_at(x, y, allowed[: round(rate * len(allowed))])

            return samples.then(transform)
        allowed = self.goal.poisonable(samples.labels).nonzero().flatten()
        order = torch.randperm(len(allowed), generator=rng)[: round(rate * len(allowed))]
        images, labels = self._stamp_at(samples.images, samples.labels, allowed[order.to(allowed.device)])
        return Samples(images, labels, samples.transforms)

    def _stamp_at(self, images: Tensor, labels: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        if not len(at):
            return images, labels
        images, labels = images.clone(), labels.clone()
        images[at] = like(self.stamp(to_pixels(images[at])), images)
        if self.goal.rule != "clean_label":
            labels[at] = self.goal.labels(labels[at], self.classes)
        return images, labels

    def test_set(self, test: Samples) -> Samples:
        """The stamped victims of a test set with their *true* labels."""
        victims = test[self.goal.victims(test.labels).nonzero().flatten()]
        return Samples(like(self.stamp(to_pixels(victims.images)), victims.images), victims.labels)
