"""Small things that many tests need: generators, images, models, contexts and a brute-force backdoor."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from fl_sim.augment import Augment
from fl_sim.backdoor import Backdoor, Goal, Rule
from fl_sim.layout import Layout
from fl_sim.models.classifier import Architecture, Classifier, Compute, build_classifier
from fl_sim.models.cnn import Cnn
from fl_sim.protocols import ClientContext, ServerContext, State, Threatening
from fl_sim.samples import Samples
from fl_sim.training import fit

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def spotted(
    count: int = 40, classes: int = 4, shape: tuple[int, int, int] = (1, 8, 8), *, dtype: torch.dtype = torch.float32
) -> Samples:
    """Balanced, easily learnt images: faint noise, and a bright row whose height tells the class."""
    labels = torch.arange(count) % classes
    images = 0.2 * torch.rand(count, *shape, generator=seeded(7))
    images[torch.arange(count), :, labels] = 0.9
    return Samples((images * 255).round().to(torch.uint8) if dtype == torch.uint8 else images, labels)


def numbered(labels: list[int]) -> Samples:
    """Images of 1×2×2 pixels of which each says its own index, in thousandths; none looks stamped by `White`."""
    index = torch.arange(len(labels)) / 1000
    return Samples(index[:, None, None, None].expand(-1, 1, 2, 2).clone(), torch.tensor(labels))


def small_model(
    seed: int = 0,
    classes: int = 4,
    shape: tuple[int, int, int] = (1, 8, 8),
    architecture: Architecture | None = None,
    compute: Compute | None = None,
) -> Classifier:
    """A CNN of 3,000 parameters with batch normalisation."""
    mean, std = (0.5,) * shape[0], (0.25,) * shape[0]
    return build_classifier(architecture or Cnn(width=4), shape, classes, mean, std, seeded(seed), compute)


class White:
    """The simplest trigger: every image becomes all white."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def white_backdoor(rule: Rule = "all_to_one", target: int = 0, source: int = 1, classes: int = 4) -> Backdoor:
    return Backdoor(White(), Goal(rule, target, source), classes)


def stamped(samples: Samples) -> Tensor:
    """Which images are all white."""
    pixels = samples.images if samples.images.is_floating_point() else samples.images / 255
    return (pixels == 1).flatten(1).all(1)


def client_context(
    model: nn.Module,
    seed: int = 0,
    *,
    threatening: Threatening | None = None,
    private: State | None = None,
    augment: Augment | None = None,
) -> ClientContext:
    layout = Layout.of(model)
    return ClientContext(
        round=1,
        client=0,
        rng=seeded(seed),
        classes=4,
        layout=layout,
        received=layout.read(model),
        augment=augment or Augment(),
        fit=fit,
        private=private or {},
        threatening=threatening,
    )


def threat(backdoor: Backdoor, *, weight: float = 0.25, rate: float | None = 1.0) -> Threatening:
    return Threatening(backdoor, rank=0, attackers=1, weight=weight, server_rate=rate)


def server_context(
    model: Classifier, clean: Samples | None = None, seed: int = 0, *, clients: int = 5, assumed_attackers: int = 1
) -> ServerContext:
    layout = Layout.of(model)
    return ServerContext(
        round=1,
        rng=seeded(seed),
        device=CPU,
        classes=4,
        clients=tuple(range(clients)),
        assumed_attackers=assumed_attackers,
        layout=layout,
        vector=layout.read(model),
        clean=clean,
        augment=Augment(crop=1),
        new_model=small_model,
        fit=fit,
    )


def weights_of(model: nn.Module) -> Tensor:
    """All parameters and floating-point buffers as one vector."""
    return Layout.of(model).read(model)
