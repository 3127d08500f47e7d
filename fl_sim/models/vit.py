"""Vision transformers (Dosovitskiy et al., ICLR 2021) in the tiny size of DeiT (Touvron et al., ICML 2021).

torchvision's encoder blocks on patches of an eighth of the image: 8×8 tokens instead of the 14×14 of ImageNet's 224
pixels, and at 32 pixels two thirds of ResNet-18's cost. There is no dropout: its masks would come from the process's
own generator, and DeiT trains without it as well.

Deviation: positions are drawn with a standard deviation of 1, that of the patches' tokens, not 0.02. The small one is
for Adam with a warm-up; federated clients take plain SGD steps (400 of them at rate 0.1 bring 3 blocks of width 48 to
0.79 on digits, but to 0.27 with small positions and patches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from fl_sim.errors import require


class Grid(nn.Module):
    """Tokens [B, 1 + s², width], the class token first, as a map [B, width, s, s] for an attention tap."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, tokens: Tensor) -> Tensor:
        grid: Tensor = tokens[:, 1:].transpose(1, 2).unflatten(2, (self.side, self.side))
        return grid


class Patches(nn.Conv2d):
    """The image's patches, each as a token of variance 1 (LeCun et al. 1998: no ReLU follows)."""

    def initialise(self, rng: Generator) -> None:
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5, generator=rng)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class VisionTransformer(nn.Module):
    """Patches and a class token with learned positions, encoder blocks, and a linear layer on the class token."""

    def __init__(
        self, shape: tuple[int, int, int], classes: int, patch: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        from torchvision.models.vision_transformer import EncoderBlock  # imported late: it takes a second

        side = shape[1] // patch
        self.patches = Patches(shape[0], width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, side * side + 1, width))
        self.blocks = nn.ModuleList(EncoderBlock(heads, width, 4 * width, 0.0, 0.0) for _ in range(depth))
        self.taps = nn.ModuleDict({str(at): Grid(side) for at in (round(depth / 3), round(2 * depth / 3), depth)})
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def initialise(self, rng: Generator) -> None:
        """Draw the tensors that belong to no layer."""
        nn.init.normal_(self.class_token, std=0.02, generator=rng)
        nn.init.normal_(self.positions, std=1.0, generator=rng)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1) + self.positions
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if str(number) in self.taps:
                self.taps[str(number)](tokens)  # a view, for whoever looks on
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


@dataclass(frozen=True)
class VitTiny:
    """A vision transformer in the tiny size, without dropout, tapped after a third, two thirds and all of its blocks.

    A patch's side is the divisor of the image's that is nearest to an eighth of it, unless `patch` says another.
    """

    width: int = 192
    depth: int = 12
    heads: int = 3
    patch: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        require(self.depth >= 3, "depth", self.depth, "must be 3 blocks or more")
        require(self.heads >= 1, "heads", self.heads, "must be 1 or more")
        fits = self.width >= 1 and self.width % self.heads == 0
        require(fits, "width", self.width, f"must be a multiple of the number of heads, {self.heads}")
        require(self.patch == "auto" or self.patch >= 1, "patch", self.patch, "must be auto or 1 or more pixels")

    def check(self, shape: tuple[int, int, int]) -> None:
        image, what = shape[1], f"vit_tiny on {shape[1]}×{shape[2]} images"
        require(shape[1] == shape[2], "", what, "needs square images")
        tokens = image // self.side(image)
        divides = image % self.side(image) == 0 and tokens >= 2
        require(divides, "patch", self.patch, f"must divide the images' {image} pixels into 2 or more")
        near = "needs a size with a divisor near an eighth of it, such as 8, 16, 28, 32 or 64"
        require(self.patch != "auto" or tokens <= 16, "", what, near)

    def side(self, image: int) -> int:
        """A patch's side on images of this many pixels."""
        if self.patch != "auto":
            return self.patch
        return min((side for side in range(1, image // 2 + 1) if image % side == 0), key=lambda s: abs(s - image / 8))

    def body(self, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, Sequence[str]]:
        network = VisionTransformer(shape, classes, self.side(shape[1]), self.width, self.depth, self.heads)
        return network, [f"taps.{number}" for number in network.taps]
