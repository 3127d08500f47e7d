"""VGG-11 with batch normalisation for small images (Simonyan & Zisserman, ICLR 2015; Ioffe & Szegedy, ICML 2015).

torchvision's convolutions, with the head that is usual on CIFAR: one linear layer on the averaged last map instead of
three with dropout. The five halvings are meant for 32×32 pixels and more: where one of the first four would leave a
single position it is left out, so that the later 3×3 convolutions still have neighbours to see. The tensors and their
names are the same at every image size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Vgg11Bn:
    """torchvision's VGG-11 with batch normalisation and one linear layer, tapped before each pooling."""

    def body(self, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, Sequence[str]]:
        from torchvision.models.vgg import cfgs, make_layers  # imported late: it takes a second

        features = make_layers(cfgs["A"], batch_norm=True)
        features[0] = nn.Conv2d(shape[0], 64, 3, padding=1)
        *early, last = (at for at, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d))
        side, taps = min(shape[1:]), []
        for pool in early:
            if side < 4:
                features[pool] = nn.Identity()
            else:
                side //= 2
                taps.append(pool - 1)
        names = [f"features.{at}" for at in (*taps, last - 1)]
        head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(512, classes)}
        return nn.Sequential(OrderedDict(features=features, **head)), names
