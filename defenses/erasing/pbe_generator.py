"""PBE's two generators: of images, and of the pixels that patches are cut from."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from fl_sim.models.classifier import initialise
from fl_sim.protocols import State


class ImageGenerator(nn.Module):
    """Normal vectors [B, latent] -> images [B, C, H, W] in [0, 1]: a linear layer, two doublings, 3 convolutions."""

    def __init__(self, latent: int, shape: tuple[int, int, int], rng: Generator, width: int = 32) -> None:
        super().__init__()
        self.latent, self.shape, self.width = latent, shape, width
        self.small = (-(-shape[1] // 4), -(-shape[2] // 4))
        self.seed = nn.Linear(latent, width * self.small[0] * self.small[1])
        double = nn.Upsample(scale_factor=2)
        self.body = nn.Sequential(
            *(nn.BatchNorm2d(width), double, nn.Conv2d(width, width, 3, padding=1)),
            *(nn.BatchNorm2d(width), nn.LeakyReLU(0.2), double, nn.Conv2d(width, width, 3, padding=1)),
            *(nn.BatchNorm2d(width), nn.LeakyReLU(0.2), nn.Conv2d(width, shape[0], 3, padding=1)),
            nn.Sigmoid(),
        )
        initialise(self, rng)

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.body(self.seed(z).view(-1, self.width, *self.small))
        return images[:, :, : self.shape[1], : self.shape[2]]


class PatchGenerator(nn.Module):
    """Normal vectors [B, latent] -> pixels [B, C, H, W] in [0, 1], of which a window becomes a patch.

    So a patch may depend on its place, as a trigger's effect does.
    """

    def __init__(self, latent: int, shape: tuple[int, int, int], rng: Generator, width: int = 128) -> None:
        super().__init__()
        self.latent, self.shape = latent, shape
        pixels = shape[0] * shape[1] * shape[2]
        self.layers = nn.Sequential(nn.Linear(latent, width), nn.LeakyReLU(0.2), nn.Linear(width, pixels), nn.Sigmoid())
        initialise(self.layers, rng)

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.layers(z).view(-1, *self.shape)
        return pixels


def draw(generator: ImageGenerator | PatchGenerator, count: int, rng: Generator, device: torch.device) -> Tensor:
    """A batch of what a generator makes."""
    made: Tensor = generator(torch.randn(count, generator.latent, generator=rng).to(device))
    return made


def paste(x: Tensor, pixels: Tensor, side: int, rng: Generator) -> Tensor:
    """Each image with a window of `side` pixels, at a place of its own, filled from `pixels`."""
    count, _, height, width = x.shape
    top = torch.randint(height - side + 1, (count, 1), generator=rng).to(x.device)
    left = torch.randint(width - side + 1, (count, 1), generator=rng).to(x.device)
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside_rows, inside_columns = (rows >= top) & (rows < top + side), (columns >= left) & (columns < left + side)
    return torch.where((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], pixels, x)


def ascend(optimizer: Optimizer, wanted: Tensor) -> None:
    """One step towards more of what is wanted."""
    optimizer.zero_grad(set_to_none=True)
    (-wanted).backward()
    optimizer.step()


def remembered(state: State, prefix: str, module: nn.Module) -> bool:
    """Load a module from what an eraser remembered under a prefix; False if there is nothing."""
    held = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if held:
        module.load_state_dict(held)
    return bool(held)


def to_remember(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """A module as plain tensors on the CPU."""
    return {f"{prefix}{name}": tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
