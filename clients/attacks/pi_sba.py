"""PI-SBA (Mei et al., IJCNN 2023): the attacker first rebuilds the classes that it lacks, then poisons.

Under non-IID data an attacker whose classes are few moves the model in a way that shows. It therefore takes the
received global model G for a teacher of what others' images look like: a conditional generator g is trained to minimise

    CE(G(g(z, y)), y) + λ · CE(D(g(z, y)), real),

and a discriminator D tells the attacker's own images from g's. Each class with less than `fill` times the mean count of
a class is filled up to that with g's images; then the attack goes on as data poisoning (the paper's own rule is
`backdoor.rule=source_specific`). A reconstruction: of the paper's networks and weights we follow the idea only.
Each time the attacker starts anew; `gan_steps: 30` cost about 15 benign trainings of two epochs on 64 digits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from clients.attacks.model_replacement import ModelReplacement
from fl_sim.backdoor import Backdoor
from fl_sim.distillation import frozen_copy
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier, initialise
from fl_sim.protocols import ClientContext, State, Update
from fl_sim.samples import Samples, like, to_pixels

NOISE = 16


class Rebuilder(nn.Module):
    """Noise and a class -> pixels in [0, 1]: a quarter of the size, then twice doubled."""

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int) -> None:
        super().__init__()
        self.shape, self.classes, self.width = shape, classes, width
        self.small = (-(-shape[1] // 4), -(-shape[2] // 4))
        self.start = nn.Linear(NOISE + classes, 2 * width * self.small[0] * self.small[1])
        self.middle = nn.Conv2d(2 * width, width, 3, padding=1)
        self.end = nn.Conv2d(width, shape[0], 3, padding=1)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        known = torch.cat([noise, F.one_hot(labels, self.classes).float()], 1)
        maps = self.start(known).view(-1, 2 * self.width, *self.small).relu()
        maps = self.middle(F.interpolate(maps, scale_factor=2.0)).relu()
        pixels: Tensor = self.end(F.interpolate(maps, size=self.shape[1:])).sigmoid()
        return pixels


def critic(channels: int, width: int) -> nn.Sequential:
    """A discriminator: pixels -> one logit, high for real images."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 1),
    )


def lacking(labels: Tensor, classes: int, fill: float) -> Tensor:
    """The labels of the images to add: each class up to `fill` times the mean count, rounded down."""
    counts = torch.bincount(labels, minlength=classes)
    missing = (int(fill * len(labels) / classes) - counts).clamp(min=0)
    return torch.arange(classes, device=labels.device).repeat_interleave(missing)


@dataclass(frozen=True)
class PiSba(ModelReplacement):
    """Fills up the classes that it lacks with images of a generator taught by the global model, then poisons."""

    boost: float | Literal["auto"] = 1.0
    fill: float = 1.0
    realism: float = 0.2
    gan_steps: int = 30
    gan_batch_size: int = 32
    gan_lr: float = 0.01
    width: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.fill >= 0, "fill", self.fill, "must be 0 or more")
        require(self.realism >= 0, "realism", self.realism, "must be 0 or more")
        require(self.gan_steps >= 1, "gan_steps", self.gan_steps, "must be 1 or more")
        require(self.gan_batch_size >= 1, "gan_batch_size", self.gan_batch_size, "must be 1 or more")
        require(self.gan_lr > 0, "gan_lr", self.gan_lr, "must be above 0")
        require(self.width >= 1, "width", self.width, "must be 1 or more channels")

    def poisoned(
        self, model: Classifier, samples: Samples, ctx: ClientContext
    ) -> tuple[Samples, Backdoor, State | None]:
        return super().poisoned(model, self.filled(model, samples, ctx), ctx)

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        # It claims no more samples than it was given.
        return replace(super().update(model, samples, ctx), samples=len(samples))

    def filled(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Samples:
        """The attacker's samples and, for each class that it lacks, rebuilt ones."""
        labels = lacking(samples.labels, ctx.classes, self.fill)
        if not len(labels):
            return samples
        rebuilder = self.rebuilder(model, samples, labels.unique(), ctx)
        with torch.no_grad():
            pixels = rebuilder(torch.randn(len(labels), NOISE, generator=ctx.rng).to(labels.device), labels)
        images = torch.cat([samples.images, like(pixels, samples.images)])
        return Samples(images, torch.cat([samples.labels, labels]), samples.transforms)

    def rebuilder(self, model: Classifier, samples: Samples, wanted: Tensor, ctx: ClientContext) -> Rebuilder:
        """A generator of the `wanted` classes, trained against the received model and the attacker's own images."""
        teacher, device, rng = frozen_copy(model), samples.labels.device, ctx.rng
        g = Rebuilder(teacher.shape, ctx.classes, self.width)
        d = critic(teacher.shape[0], self.width)
        for network in (g, d):
            initialise(network, rng)
            network.to(device)
        g_adam, d_adam = (torch.optim.Adam(n.parameters(), lr=self.gan_lr, betas=(0.5, 0.999)) for n in (g, d))
        for _ in range(self.gan_steps):
            real = to_pixels(samples.images[self._drawn(len(samples), rng).to(device)])
            labels = wanted[self._drawn(len(wanted), rng).to(device)]
            fake = g(torch.randn(len(labels), NOISE, generator=rng).to(device), labels)
            d_adam.zero_grad()
            told = torch.cat([d(real), d(fake.detach())])
            truth = torch.cat([torch.ones_like(told[: len(real)]), torch.zeros_like(told[len(real) :])])
            F.binary_cross_entropy_with_logits(told, truth).backward()
            d_adam.step()
            g_adam.zero_grad()
            believed = F.softplus(-d(fake)).mean()  # the cross-entropy of being taken for real
            (F.cross_entropy(teacher(fake), labels) + self.realism * believed).backward()
            g_adam.step()
        return g

    def _drawn(self, among: int, rng: Generator) -> Tensor:
        return torch.randint(among, (self.gan_batch_size,), generator=rng)
