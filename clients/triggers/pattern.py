"""Learned patterns of fixed place: how strongly another trigger marks each pixel, and a pattern within that.

x' = x + a·(p − x),   a: the carrier's opacity in each pixel, p: the learned pattern
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clients.triggers.drawing import holding
from fl_sim.errors import require
from fl_sim.protocols import State, Trigger, Workshop
from fl_sim.samples import Samples, to_pixels


def opacity(trigger: Trigger, x: Tensor) -> Tensor:
    """How much a trigger hides of each pixel of images like `x`, [1, C, H, W]: 0 outside its support, 1 for a patch.

    From its stamps on a black and on a white image: for a mix (1 − a)·x + a·p this is a; for anything else the
    largest change that it makes on the two.
    """
    black = torch.zeros_like(x[:1]) if len(x) else x.new_zeros(1, *x.shape[1:])
    white = torch.ones_like(black)
    with torch.no_grad():
        dark, light = trigger(black).clamp(0, 1), trigger(white).clamp(0, 1)
    return torch.stack([1 - (light - dark), dark, white - light]).amax(0).clamp(0, 1)


def own_pattern(trigger: Trigger, x: Tensor) -> Tensor:
    """The pattern that a mixing trigger mixes in, [1, C, H, W]; 0 outside its support."""
    hidden = opacity(trigger, x)
    dark = trigger(torch.zeros_like(hidden)).clamp(0, 1)
    return torch.where(hidden > 0, dark / hidden.clamp_min(1e-6), 0.0).clamp(0, 1)


def mixed(x: Tensor, pattern: Tensor, hidden: Tensor) -> Tensor:
    """x + a·(p − x)."""
    return x + hidden * (pattern - x)


@dataclass(frozen=True)
class Carried(ABC):
    """A learned pattern in the place and with the opacity of another trigger, the carrier; at first that trigger."""

    carrier: Trigger
    pattern: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def check(self, shape: tuple[int, int, int]) -> None:
        if hasattr(self.carrier, "check"):
            self.carrier.check(shape)
        marks = bool((opacity(self.carrier, torch.zeros(1, *shape)) > 0).any())
        name = type(self.carrier).__name__
        require(marks, "", name, "changes no pixel of a plain image, so there is no place for a learned pattern")

    def __call__(self, x: Tensor) -> Tensor:
        if self.pattern is None:
            return self.carrier(x)
        return mixed(x, self.pattern.to(x), opacity(self.carrier, x))

    def learn(self, samples: Samples, workshop: Workshop) -> State:
        known = self.recall(workshop.record) if "pattern" in workshop.record else self
        x = to_pixels(samples.images[:1])
        begin = self.begin(x) if known.pattern is None else known.pattern
        return {"pattern": self.improved(begin.clone(), samples, workshop)}

    def begin(self, x: Tensor) -> Tensor:
        """The pattern that learning begins with."""
        return own_pattern(self.carrier, x)

    @abstractmethod
    def improved(self, pattern: Tensor, samples: Samples, workshop: Workshop) -> Tensor:
        """One lesson."""

    def recall(self, record: State) -> Carried:
        pattern = record.get("pattern")
        assert pattern is None or isinstance(pattern, Tensor)
        return holding(self, pattern=pattern)


def descended(
    pattern: Tensor,
    samples: Samples,
    workshop: Workshop,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    step: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int,
) -> Tensor:
    """Epochs of descent: `loss(pattern, pixels, labels)` on a batch, then `step(pattern, gradient)`."""
    with torch.enable_grad():
        for _ in range(epochs):
            for x, y in samples.batches(batch_size, workshop.rng):
                now = pattern.detach().requires_grad_()
                [gradient] = torch.autograd.grad(loss(now, x, y), now)
                pattern = step(pattern, gradient).detach()
    return pattern
