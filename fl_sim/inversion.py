"""Trigger inversion: which small stamp turns images into a class? (Neural Cleanse; Wang et al., IEEE S&P 2019.)

For each class t: min over mask m and pattern p of CE(f((1 − m)·x + m·p), t) + λ_t·‖m‖₁, both in [0, 1] by a tanh.
λ_t is 0 until the stamp succeeds, then grows while it does and shrinks while it doesn't; the smallest mask that ever
succeeded counts. A backdoor's class needs a much smaller mask than the others: an outlier by median absolute deviation.

All classes are inverted side by side, as one batch of classes × images; they stay independent of each other, because
the model is in evaluation mode and Adam works element by element.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.samples import Samples

GROUP = 16
"""Classes inverted at once: enough to fill a device, few enough to fit into its memory."""


@dataclass(frozen=True)
class Stamp:
    """A synthetic trigger: (1 − m)·x + m·p with a mask [1, H, W] and a pattern [C, H, W]."""

    mask: Tensor
    pattern: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.pattern.expand_as(x), self.mask.expand_as(x))


@dataclass(frozen=True)
class Inverted:
    """What was found for every class: masks [K, 1, H, W], patterns [K, C, H, W], how often they succeed [K]."""

    masks: Tensor
    patterns: Tensor
    success: Tensor

    @property
    def norms(self) -> Tensor:
        """‖m‖₁ of each class."""
        return self.masks.flatten(1).sum(1)

    @property
    def suspect(self) -> int:
        """The class of the smallest mask."""
        return int(self.norms.argmin())

    def anomalous(self, threshold: float) -> list[int]:
        """The classes whose masks are outliers on the small side, the smallest mask first."""
        norms = self.norms
        outlying = (anomaly_index(norms) > threshold) & (norms < norms.quantile(0.5))
        order: list[int] = norms.argsort().tolist()
        return [label for label in order if outlying[label]]

    def stamp(self, label: int) -> Stamp:
        return Stamp(self.masks[label], self.patterns[label])


def anomaly_index(norms: Tensor) -> Tensor:
    """|n − median| / (1.4826 · MAD); the constant makes MAD a standard deviation where the norms are normal."""
    gap = (norms - norms.quantile(0.5)).abs()
    return gap / (1.4826 * gap.quantile(0.5)).clamp_min(1e-8)


def adapted(
    cost: Tensor, ups: Tensor, downs: Tensor, reached: Tensor, *, first: float, factor: float, patience: int
) -> tuple[Tensor, Tensor, Tensor]:
    """λ and how often in a row the stamps did and didn't succeed, after a step in which `reached` of them did.

    After `patience` successes λ becomes `first`, or grows by `factor`; after as many failures it shrinks by factor^1.5.
    """
    ups, downs = torch.where(reached, ups + 1, 0), torch.where(reached, 0, downs + 1)
    rising, falling = ups >= patience, downs >= patience
    raised = torch.where(cost == 0, first, cost * factor)
    cost = torch.where(rising, raised, torch.where(falling, cost / factor**1.5, cost))
    return cost, torch.where(rising, 0, ups), torch.where(falling, 0, downs)


@dataclass(frozen=True)
class Inversion:
    """The hyperparameters of trigger inversion: Adam with rate `lr` for `steps`, each on a batch of clean images.

    A stamp succeeds if `success` of a batch become its class; λ begins at `cost`.
    """

    steps: int = 200
    batch_size: int = 32
    lr: float = 0.1
    success: float = 0.99
    cost: float = 1e-3
    factor: float = 2.0
    patience: int = 5

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "must be 1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "must be 1 or more")
        require(self.lr > 0, "lr", self.lr, "must be above 0")
        require(0 < self.success <= 1, "success", self.success, "must be above 0 and at most 1")
        require(self.cost > 0, "cost", self.cost, "must be above 0")
        require(self.factor > 1, "factor", self.factor, "must be above 1")
        require(self.patience >= 1, "patience", self.patience, "must be 1 or more")

    def invert(self, model: Classifier, samples: Samples, classes: int, rng: Generator) -> Inverted:
        """The smallest stamp for each class; the model is left alone."""
        frozen = deepcopy(model).eval().requires_grad_(False)
        labels = torch.arange(classes, device=samples.labels.device)
        found = [self._group(frozen, samples, group, rng) for group in labels.split(GROUP)]
        return Inverted(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _group(
        self, model: Classifier, samples: Samples, labels: Tensor, rng: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, device = len(labels), labels.device
        channels, height, width = samples.images.shape[1:]

        def drawn(depth: int) -> Tensor:
            start = torch.rand(count, depth, height, width, generator=rng).mul_(0.98).add_(0.01)
            return start.mul_(2).sub_(1).atanh_().to(device).requires_grad_()

        raw_masks, raw_patterns = drawn(1), drawn(channels)
        optimizer = torch.optim.Adam([raw_masks, raw_patterns], lr=self.lr, betas=(0.5, 0.9))
        cost = torch.zeros(count, device=device)
        ups = downs = torch.zeros(count, dtype=torch.long, device=device)
        smallest = torch.full((count,), torch.inf, device=device)
        best_masks, best_patterns = torch.zeros_like(raw_masks), torch.zeros_like(raw_patterns)
        for _, x in zip(range(self.steps), _endless(samples, self.batch_size, rng), strict=False):
            masks, patterns = _squash(raw_masks), _squash(raw_patterns)
            logits = _stamped_logits(model, x, masks, patterns)
            wanted = labels[:, None].expand(count, len(x))
            norms = masks.flatten(1).sum(1)
            entropy = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            loss = (entropy.view(count, -1).mean(1) + cost * norms).sum()
            raw_masks.grad, raw_patterns.grad = torch.autograd.grad(loss, [raw_masks, raw_patterns])
            optimizer.step()
            with torch.no_grad():
                reached = (logits.argmax(2) == wanted).float().mean(1) >= self.success
                better = reached & (norms < smallest)
                smallest = torch.where(better, norms, smallest)
                chosen = better[:, None, None, None]
                best_masks = torch.where(chosen, masks, best_masks)
                best_patterns = torch.where(chosen, patterns, best_patterns)
                cost, ups, downs = adapted(
                    cost, ups, downs, reached, first=self.cost, factor=self.factor, patience=self.patience
                )
        # A class that no stamp ever reached keeps the last one, whose mask no cost has made small.
        never = smallest.isinf()[:, None, None, None]
        best_masks = torch.where(never, _squash(raw_masks.detach()), best_masks)
        best_patterns = torch.where(never, _squash(raw_patterns.detach()), best_patterns)
        return best_masks, best_patterns, _success(model, samples, labels, best_masks, best_patterns, self.batch_size)


def _squash(raw: Tensor) -> Tensor:
    return raw.tanh().add(1).div(2)


def _endless(samples: Samples, size: int, rng: Generator) -> Iterator[Tensor]:
    while True:
        for x, _ in samples.batches(size, rng):
            yield x


def _stamped_logits(model: Classifier, x: Tensor, masks: Tensor, patterns: Tensor) -> Tensor:
    """Logits [K, B, classes] of a batch under each of K stamps."""
    stamped = x + masks[:, None] * (patterns[:, None] - x)
    logits: Tensor = model(stamped.flatten(0, 1))
    return logits.view(len(masks), len(x), -1)


@torch.no_grad()
def _success(model: Classifier, samples: Samples, labels: Tensor, masks: Tensor, patterns: Tensor, size: int) -> Tensor:
    """The share of all samples that each stamp turns into its class."""
    hits = torch.zeros(len(labels), device=labels.device)
    for x, _ in samples.chunks(size):
        hits += (_stamped_logits(model, x, masks, patterns).argmax(2) == labels[:, None]).sum(1)
    return hits / len(samples)
