"""A backdoor: a trigger, the rule that says what stamped images shall become, and a target class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Generator, Tensor

from fl_sim.errors import require
from fl_sim.protocols import Covering, Crafting, Learned, Selecting, State, Trigger, Workshop
from fl_sim.samples import Samples, like, to_pixels

Rule: TypeAlias = Literal["auto", "all_to_one", "all_to_all", "source_specific", "clean_label"]
PoisonMode: TypeAlias = Literal["dataset", "per_batch"]


@dataclass(frozen=True)
class Goal:
    """Which images a backdoor is after, and what they shall be taken for.

    all_to_one       every class becomes the target
    all_to_all       class y becomes y + 1
    source_specific  images of the source class become the target
    clean_label      as all_to_one when attacking; only target-class images are poisoned, their labels are true
    auto             what the trigger's paper does: clean_label for the clean-label attacks, else all_to_one
    """

    rule: Rule = "all_to_one"
    target: int = 0
    source: int = 1

    def check(self, classes: int) -> None:
        require(0 <= self.target < classes, "target", self.target, f"must be a class from 0 to {classes - 1}")
        require(0 <= self.source < classes, "source", self.source, f"must be a class from 0 to {classes - 1}")
        distinct = self.rule != "source_specific" or self.source != self.target
        require(distinct, "source", self.source, "must differ from the target class")

    def resolved(self, trigger: Trigger) -> Goal:
        """The same goal with `auto` decided."""
        preferred: Rule = getattr(trigger, "rule", "all_to_one")
        return replace(self, rule=preferred) if self.rule == "auto" else self

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

    @torch.no_grad()
    def stamp(self, pixels: Tensor) -> Tensor:
        """The trigger on a batch of pixels in [0, 1]; the input is left alone."""
        return self.trigger(pixels).clamp(0, 1)

    def recalling(self, record: State) -> Backdoor:
        """The same backdoor with the trigger that a record stands for."""
        if not record or not isinstance(self.trigger, Learned):
            return self
        return replace(self, trigger=self.trigger.recall(record))

    def victims(self, x: Tensor, y: Tensor) -> Tensor:
        """Which test images count for the attack's success."""
        wanted = self.goal.victims(y)
        return wanted & self.trigger.selects(x) if isinstance(self.trigger, Selecting) else wanted

    @property
    def needs_workshop(self) -> bool:
        """Whether poisoning takes more than stamping."""
        return isinstance(self.trigger, (Crafting, Covering, Learned))

    @property
    def uses_model(self) -> bool:
        """Whether what it makes in the workshop is made with the model there."""
        return self.needs_workshop and getattr(self.trigger, "uses_model", True)

    def poison(
        self, samples: Samples, rate: float, mode: PoisonMode, rng: Generator, workshop: Workshop | None = None
    ) -> Samples:
        """Training samples of which a share `rate` is stamped and relabelled.

        dataset    a fixed share of the samples, drawn once; augmentation comes after the stamp
        per_batch  the first `rate` of each shuffled batch, after augmentation
        Where the rule or the trigger admits only some images, the rate is that of the admitted samples.
        """
        if mode == "per_batch":

            def transform(x: Tensor, y: Tensor, batch_rng: Generator) -> tuple[Tensor, Tensor]:
                allowed = self._poisonable(x, y)
                shop = None if workshop is None else replace(workshop, rng=batch_rng)
                return self._poisoned(x, y, allowed, self._counts(len(allowed), rate), shop)

            return samples.then(transform)
        allowed = self._poisonable(samples.images, samples.labels)
        order = torch.randperm(len(allowed), generator=rng).to(allowed.device)
        counts = self._counts(len(allowed), rate)
        images, labels = self._poisoned(samples.images, samples.labels, allowed[order], counts, workshop)
        return Samples(images, labels, samples.transforms)

    def _poisonable(self, images: Tensor, labels: Tensor) -> Tensor:
        allowed = self.goal.poisonable(labels)
        if isinstance(self.trigger, Selecting):
            allowed = allowed & self.trigger.selects(to_pixels(images))
        return allowed.nonzero().flatten()

    def _counts(self, allowed: int, rate: float) -> tuple[int, int]:
        """How many are poisoned, and how many serve as cover: at most half of the rest, so that some stay clean."""
        poisoned = round(rate * allowed)
        wanted = round(self.trigger.cover * poisoned) if isinstance(self.trigger, Covering) else 0
        return poisoned, min(wanted, (allowed - poisoned) // 2)

    def _poisoned(
        self, images: Tensor, labels: Tensor, order: Tensor, counts: tuple[int, int], workshop: Workshop | None
    ) -> tuple[Tensor, Tensor]:
        """The first of `order` stamped and relabelled, the next as cover; the inputs are left alone."""
        poisoned, covered = counts
        if not poisoned:
            return images, labels
        at, cover = order[:poisoned], order[poisoned : poisoned + covered]
        x, y = to_pixels(images[at]), labels[at]
        if isinstance(self.trigger, Crafting):
            assert workshop is not None
            stamped = self.trigger.craft(x, y, workshop).clamp(0, 1)
        else:
            stamped = self.stamp(x)
        new_images, new_labels = images.clone(), labels.clone()
        new_images[at] = like(stamped, images)
        if self.goal.rule != "clean_label":
            new_labels[at] = self.goal.labels(y, self.classes)
        if len(cover):
            assert workshop is not None
            assert isinstance(self.trigger, Covering)
            disguised = self.trigger.disguise(to_pixels(images[cover]), labels[cover], workshop)
            new_images[cover] = like(disguised.clamp(0, 1), images)
        return new_images, new_labels

    def test_set(self, test: Samples) -> Samples:
        """The stamped victims of a test set with their *true* labels."""
        victims = test[self.victims(to_pixels(test.images), test.labels).nonzero().flatten()]
        return Samples(like(self.stamp(to_pixels(victims.images)), victims.images), victims.labels)
