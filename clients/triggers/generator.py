"""The small image-to-image network that the generated triggers share, and how an attacker trains it.

A U-Net of one level: convolutions at full resolution, at half, and back with a skip connection; two coordinate
channels tell it where it is. Each layer is normalised by its own image alone (group normalisation with one group and
no weights), so that a stamp does not depend on what else is in the batch. Any size from 8×8, any channels.
All weights are one flat vector: that is what a record holds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from clients.triggers.drawing import holding
from fl_sim.errors import require
from fl_sim.protocols import State, Workshop
from fl_sim.randomness import generator
from fl_sim.samples import Samples
from fl_sim.training import Objective, fit


def kernel_shapes(channels: int, outputs: int, width: int) -> list[tuple[int, int, int, int]]:
    """The shapes of the five convolutions' kernels; each has a bias, too."""
    pairs = [(channels + 2, width), (width, 2 * width), (2 * width, 2 * width), (3 * width, width), (width, outputs)]
    return [(outgoing, incoming, 3, 3) for incoming, outgoing in pairs]


def drawn_weights(channels: int, outputs: int, width: int, rng: Generator) -> Tensor:
    """He et al. 2015 (fan in), biases zero, as one vector."""
    parts = []
    for shape in kernel_shapes(channels, outputs, width):
        parts += [torch.randn(math.prod(shape), generator=rng) * math.sqrt(2 / math.prod(shape[1:]))]
        parts += [torch.zeros(shape[0])]
    return torch.cat(parts)


def coordinates(x: Tensor) -> Tensor:
    """Rows and columns from −1 to 1 as two more channels [B, 2, H, W]."""
    rows = torch.linspace(-1, 1, x.shape[2], device=x.device)[:, None].expand(x.shape[2:])
    columns = torch.linspace(-1, 1, x.shape[3], device=x.device)[None, :].expand(x.shape[2:])
    return torch.stack([rows, columns]).expand(len(x), -1, -1, -1)


class Painter(nn.Module):
    """Pixels [B, C, H, W] -> raw maps [B, outputs, H, W] of about unit size, its weights one vector."""

    def __init__(self, weights: Tensor, channels: int, outputs: int, width: int) -> None:
        super().__init__()
        self.shapes = kernel_shapes(channels, outputs, width)
        self.weights = nn.Parameter(weights.clone())

    def forward(self, x: Tensor) -> Tensor:
        sizes = [size for shape in self.shapes for size in (math.prod(shape), shape[0])]
        parts = self.weights.split(sizes)
        layers = [(k.view(shape), bias) for k, bias, shape in zip(parts[::2], parts[1::2], self.shapes, strict=True)]

        def layer(index: int, maps: Tensor, stride: int = 1) -> Tensor:
            kernel, bias = layers[index]
            return F.group_norm(F.conv2d(maps, kernel, bias, stride=stride, padding=1), 1).relu()

        fine = layer(0, torch.cat([2 * x - 1, coordinates(x)], 1))
        coarse = layer(2, layer(1, fine, stride=2))
        back = F.interpolate(coarse, x.shape[2:], mode="nearest")
        kernel, bias = layers[4]
        return F.conv2d(layer(3, torch.cat([fine, back], 1)), kernel, bias, padding=1)


@dataclass(frozen=True)
class Painted(ABC):
    """A learned trigger whose stamp a painter makes: what all of these share.

    Learning is Adam with rate `lr`, `epochs` over the attacker's own samples each time that it attacks; it goes on
    from where the attackers' common record is. One epoch costs about two to three of a small model's training epochs.
    """

    width: int = 8
    epochs: int = 1
    batch_size: int = 32
    lr: float = 0.01
    seed: int = 0
    weights: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.width >= 1, "width", self.width, "must be 1 or more channels")
        require(self.epochs >= 1, "epochs", self.epochs, "must be 1 or more")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "must be 2 or more")
        require(self.lr > 0, "lr", self.lr, "must be above 0")

    def outputs(self, channels: int) -> int:
        """How many maps the painter makes for images of so many channels."""
        return channels

    @abstractmethod
    def painted(self, painter: Painter, x: Tensor) -> Tensor:
        """Stamped pixels in [0, 1], with gradients to the painter."""

    @abstractmethod
    def objective(self, samples: Samples, workshop: Workshop) -> Objective:
        """What the painter is trained for: (painter, pixels, labels) -> loss."""

    def painter(self, x: Tensor) -> Painter:
        """The painter as learned so far, at first one with random weights."""
        channels = x.shape[1]
        shape = channels, self.outputs(channels), self.width
        weights = drawn_weights(*shape, generator(self.seed, "painter")) if self.weights is None else self.weights
        return Painter(weights, *shape).to(x.device)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self.painted(self.painter(x), x)

    def learn(self, samples: Samples, workshop: Workshop) -> State:
        known = self.recall(workshop.record) if workshop.record else self
        painter = known.painter(samples.images)
        fit(
            painter,
            samples,
            torch.optim.Adam(painter.parameters(), lr=self.lr),
            epochs=self.epochs,
            batch_size=self.batch_size,
            rng=workshop.rng,
            objective=self.objective(samples, workshop),
        )
        return {"weights": painter.weights.detach().clone()}

    def recall(self, record: State) -> Painted:
        weights = record["weights"]
        assert isinstance(weights, Tensor)
        return holding(self, weights=weights)
