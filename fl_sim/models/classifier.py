"""What every model is here: normalisation first, then a body, with attention taps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

Precision = Literal["float32", "tf32", "bfloat16"]


class Architecture(Protocol):
    """A spec that builds a network's body for an image shape and a number of classes."""

    def body(self, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, Sequence[str]]:
        """The network, and its submodules whose output maps may serve as attention taps, in forward order.

        Of one resolution only the last map, unless the network keeps one resolution throughout.
        """
        ...


@dataclass(frozen=True)
class Compute:
    """How a forward pass is carried out: numbers' precision and memory format."""

    precision: Precision = "float32"
    channels_last: bool = True


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that can be trained on a single sample whose map is 1×1.

    A lone value has no variance, and PyTorch refuses it; here the running statistics serve for it and stay as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class Classifier(nn.Module):
    """Pixels in [0, 1] -> logits: the normalisation is the first layer, so triggers and data live in pixel space."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        body: nn.Module,
        candidates: Sequence[str],
        shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        compute: Compute,
    ) -> None:
        super().__init__()
        for module in body.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNorm  # the same tensors and names: only a lone value fares differently
        self.body = body
        self.shape = shape
        self.compute = compute
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        if compute.channels_last:
            body.to(memory_format=torch.channels_last)
        self.taps = self._resolve(candidates)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        if self.compute.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with self._autocast(x.device.type):
            logits: Tensor = self.body(x)
        return logits.float()

    def with_taps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and the tapped feature maps, in one forward pass."""
        return self.observe(x, self.taps)

    def observe(self, x: Tensor, names: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        """Logits and the outputs of the named submodules of the body, in one forward pass."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
                seen[name] = output

            return hook

        hooks = [self.body.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        try:
            logits = self(x)
        finally:
            for hook in hooks:
                hook.remove()
        return logits, [seen[name] for name in names]

    @property
    def head(self) -> nn.Linear:
        """The layer that makes the logits: the last linear one."""
        return [module for module in self.modules() if isinstance(module, nn.Linear)][-1]

    def _autocast(self, device: str) -> AbstractContextManager[object]:
        if self.compute.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(device, dtype=torch.bfloat16)

    def _resolve(self, candidates: Sequence[str]) -> tuple[str, ...]:
        """The candidates whose maps are at least 2×2: a single position has nothing to attend to."""
        was_training = self.training
        self.eval()
        with torch.no_grad():
            _, maps = self.observe(torch.zeros(1, *self.shape, device=self.mean.device), candidates)
        self.train(was_training)
        return tuple(name for name, map_ in zip(candidates, maps, strict=True) if min(map_.shape[2:]) >= 2)


def initialise(model: nn.Module, rng: Generator) -> None:
    """Draw all weights anew from `rng`.

    He et al. 2015 (fan out) for convolutions; for linear layers uniform in ±1/√inputs, PyTorch's own choice; Glorot &
    Bengio 2010 for attention's projections. A module that has an `initialise(rng)` draws its own tensors by that.
    """
    for module in model.modules():
        if callable(own := getattr(module, "initialise", None)):
            own(rng)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=rng)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            reset_linear(module, rng)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            module.reset_parameters()  # ones and zeros
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.xavier_uniform_(module.in_proj_weight, generator=rng)
            nn.init.zeros_(module.in_proj_bias)
        elif next(module.parameters(recurse=False), None) is not None:
            # What its constructor drew came from the process's generator: no seed would give it again.
            raise TypeError(f"{type(module).__name__} has weights of an unknown kind: give it an initialise(rng)")


def reset_linear(layer: nn.Linear, rng: Generator) -> None:
    """Draw a linear layer's weights anew; `rng` is a CPU generator whatever the layer's device."""
    bound = 1 / math.sqrt(layer.in_features)
    with torch.no_grad():
        for tensor in layer.parameters(recurse=False):
            tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=rng))


def build_classifier(
    architecture: Architecture,
    shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    rng: Generator,
    compute: Compute | None = None,
) -> Classifier:
    """A freshly initialised classifier on the CPU."""
    body, candidates = architecture.body(shape, classes)
    initialise(body, rng)
    return Classifier(body, candidates, shape, mean, std, compute or Compute())
