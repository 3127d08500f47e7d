"""Pre-activation residual networks (He et al., "Identity mappings in deep residual networks", ECCV 2016).

The 18-layer one has the groups of ResNet-18 (He et al., CVPR 2016) behind the 3×3 stem that is usual on CIFAR. It ends
with a BN-ReLU, as the paper has it; kuangliu's pytorch-cifar and BackdoorBench leave that out (1,024 parameters fewer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


class PreactivationBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))); across a change of shape the shortcut is a 1×1 conv of relu(bn(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


def preactivation_network(
    channels: int, stem: int, widths: Sequence[int], blocks: int, classes: int
) -> tuple[nn.Module, list[str]]:
    """A stem of `stem` channels, one group of blocks for each width, a last BN-ReLU; tapped at the groups' outputs."""
    layers = nn.Sequential()
    layers.add_module("stem", nn.Conv2d(channels, stem, 3, padding=1, bias=False))
    inputs = stem
    names = [f"group{number}" for number in range(1, len(widths) + 1)]
    for index, (name, width) in enumerate(zip(names, widths, strict=True)):
        group = nn.Sequential()
        for block in range(blocks):
            stride = 2 if index and not block else 1
            group.append(PreactivationBlock(inputs, width, stride))
            inputs = width
        layers.add_module(name, group)
    layers.add_module("bn", nn.BatchNorm2d(inputs))
    layers.add_module("relu", nn.ReLU())
    layers.add_module("pool", nn.AdaptiveAvgPool2d(1))
    layers.add_module("flatten", nn.Flatten())
    layers.add_module("head", nn.Linear(inputs, classes))
    return layers, names


@dataclass(frozen=True)
class PreactResNet18:
    """ResNet-18 of pre-activation blocks with the usual CIFAR stem, tapped before the last BN-ReLU."""

    def body(self, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, Sequence[str]]:
        return preactivation_network(shape[0], 64, (64, 128, 256, 512), 2, classes)
