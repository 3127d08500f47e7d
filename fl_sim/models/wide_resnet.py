"""Wide residual networks (Zagoruyko & Komodakis, BMVC 2016), as NAD, ABL and ARGD use them on CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from fl_sim.errors import require


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


@dataclass(frozen=True)
class WideResNet:
    """A wide residual network of three groups, tapped at each group's output, before the last BN-ReLU."""

    depth: int = 16
    widen: int = 1

    def __post_init__(self) -> None:
        require(self.depth >= 10 and (self.depth - 4) % 6 == 0, "depth", self.depth, "must be 6n+4: 10, 16, 22, 28, 40")
        require(self.widen >= 1, "widen", self.widen, "must be 1 or more")

    def body(self, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, Sequence[str]]:
        blocks = (self.depth - 4) // 6
        widths = [16 * self.widen, 32 * self.widen, 64 * self.widen]
        layers = nn.Sequential()
        layers.add_module("stem", nn.Conv2d(shape[0], 16, 3, padding=1, bias=False))
        inputs = 16
        for index, width in enumerate(widths):
            group = nn.Sequential()
            for block in range(blocks):
                stride = 2 if index and not block else 1
                group.append(PreactivationBlock(inputs, width, stride))
                inputs = width
            layers.add_module(f"group{index + 1}", group)
        layers.add_module("bn", nn.BatchNorm2d(inputs))
        layers.add_module("relu", nn.ReLU())
        layers.add_module("pool", nn.AdaptiveAvgPool2d(1))
        layers.add_module("flatten", nn.Flatten())
        layers.add_module("head", nn.Linear(inputs, classes))
        return layers, ["group1", "group2", "group3"]
