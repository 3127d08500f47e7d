"""ResNet-18 for small images (He et al., CVPR 2016): torchvision's network with a 3×3 stem and no first pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ResNet18:
    """torchvision's ResNet-18 with the usual CIFAR stem."""

    def body(self, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, Sequence[str]]:
        from torchvision.models.resnet import BasicBlock, ResNet  # imported late: it takes a second

        body: nn.Module = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=classes)
        body.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
        body.maxpool = nn.Identity()
        return body, ["layer1", "layer2", "layer3", "layer4"]
