"""Whole networks of several clients as one, and which networks that works for."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fl_sim.models.classifier import BatchNorm, Classifier
from fl_sim.together.layers import Lanes, Stacked, StackedBatchNorm, StackedConv, StackedLinear
from fl_sim.walk import walk

KINDS: dict[type[nn.Module], type[Stacked]] = {
    nn.Conv2d: StackedConv,
    BatchNorm: StackedBatchNorm,
    nn.BatchNorm2d: StackedBatchNorm,
    nn.Linear: StackedLinear,
}
"""Layers that have a stacked form."""
NEUTRAL = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Flatten,
    nn.Identity,
    nn.Sequential,
)
"""Layers that do the same to every channel, however many there are."""


class Crowd:
    """Several clients' models as one network."""

    def __init__(self, models: Sequence[Classifier]) -> None:
        self._models = models
        self.lanes = Lanes(len(models))
        self._layers: list[tuple[Stacked, Sequence[nn.Module]]] = []
        """Each with its members, the clients' own."""
        places: dict[int, Any] = {}
        for modules in zip(*(walk(model).modules for model in models), strict=True):
            members: Any = [module for _, module in modules]
            if (kind := type(members[0])) in KINDS:
                places[id(members[0])] = layer = KINDS[kind](members, self.lanes)
                self._layers.append((layer, members))
            elif kind in NEUTRAL and not members[0]._modules:
                places[id(members[0])] = members[0]
        # A copy in which a stacked layer stands wherever the first client has its own, and layers without anything of
        # their own serve both; no tensor is copied.
        places |= {id(tensor): tensor for tensor in (models[0].mean, models[0].std)}
        self.network = deepcopy(models[0], places)
        self._mean, self._std = (torch.cat([getattr(m, name) for m in models], 1) for name in ("mean", "std"))
        self.network.train()
        self.narrow(len(models))

    def parameters(self) -> list[nn.Parameter]:
        """[K, ...] each, in the order of a client's own."""
        return list(self.network.parameters())

    def narrow(self, count: int) -> None:
        """Leave only the first `count` clients in training; the parameters are new objects in the same memory."""
        self.lanes.count = count
        for layer, _ in self._layers:
            layer.narrow()
        channels = count * self._mean.shape[1] // len(self._models)
        self.network.mean, self.network.std = self._mean[:, :channels], self._std[:, :channels]

    def __call__(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Pixels [B, K, C, H, W], of which `valid` [B, K] tells the real ones -> logits [B, K, classes]."""
        self.lanes.valid, self.lanes.rows = valid, None if valid is None else valid.sum(0)
        logits: Tensor = self.network(_side_by_side(x, self.network.compute.channels_last))
        return logits.view(len(logits), self.lanes.count, -1)

    def hand_back(self) -> None:
        """Put what was trained into the clients' own models."""
        with torch.no_grad():
            for layer, members in self._layers:
                for part, tensor in layer.whole.items():
                    torch._foreach_copy_(layer.own(members, part), tensor.unbind())


def _side_by_side(x: Tensor, channels_last: bool) -> Tensor:
    """[B, K, C, H, W] as [B, K·C, H, W], at one copy at most."""
    if not channels_last:
        return x.flatten(1, 2)
    return x.permute(0, 3, 4, 1, 2).flatten(3).permute(0, 3, 1, 2)


def signature(model: nn.Module) -> str:
    """What two models must have in common to be stacked."""
    return f"{getattr(model, 'compute', None)}\n{type(model).__qualname__}\n{walk(model).layers}"


def unfit(model: nn.Module) -> str | None:
    """Why models of this kind must be trained one by one; None if they can be stacked."""
    if not isinstance(model, Classifier):
        return f"{type(model).__name__} is no classifier of fl-sim's"
    for name, layer in model.named_modules():
        if reason := _strange(layer):
            return f"{name or type(model).__name__}: {reason}"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if len({id(parameter) for parameter in parameters.values()}) < len(parameters):
        return "two of its layers share a tensor"
    return None if _proven(model) else "stacked, its network does not compute what it computes alone"


def has_hook(layer: nn.Module) -> bool:
    """Whether something looks on when the layer computes."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


def is_watched(model: nn.Module) -> bool:
    """Whether something looks on when the model or a part of it computes."""
    return has_hook(model) or any(has_hook(module) for _, module in walk(model).modules)


def _strange(layer: nn.Module) -> str | None:
    """What a layer has that its stacked form would not."""
    kind = type(layer).__name__
    if has_hook(layer):
        return "has a hook"
    if any(not parameter.requires_grad for parameter in layer.parameters(recurse=False)):
        return "is frozen"
    if type(layer) in KINDS:
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            return f"{kind} pads with {layer.padding_mode}"
        if isinstance(layer, nn.BatchNorm2d) and not (layer.affine and layer.track_running_stats and layer.momentum):
            return f"{kind} without weights, running statistics or momentum"
        return None
    if type(layer) in NEUTRAL or isinstance(layer, Classifier):
        return None
    own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    # A module around known layers, such as a residual block, is tried below.
    return None if next(layer.children(), None) is not None and not own else f"{kind} has no stacked form"


def _proven(model: Classifier) -> bool:
    """Whether two of them stacked give the logits and gradients that each gives alone, in double precision.

    What a block does in between is its secret, so no tensor of the two is zero, as a residual branch's last weights may
    be at the start. The second client's batch is padded.
    """
    rng = Generator().manual_seed(0)
    first, second = (deepcopy(model).cpu().double() for _ in range(2))  # not every device has double precision
    for each in (first, second):
        each.compute = replace(each.compute, precision="float32")
        each.train()
        with torch.no_grad():
            for parameter in each.parameters():
                noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
                parameter.add_((0.1 * parameter.abs().mean() + 0.01) * noise)
    pixels = torch.rand(4, 2, *model.shape, generator=rng, dtype=torch.float64)
    crowd = Crowd([first, second])
    valid = pixels.new_tensor([[1, 1], [1, 1], [1, 1], [1, 0]])
    try:
        together = crowd(pixels, valid)
        alone = [first(pixels[:, 0]), second(pixels[:3, 1])]
        whole = torch.autograd.grad((together * valid[:, :, None]).square().sum(), crowd.parameters())
    except (RuntimeError, ValueError, TypeError):  # the shapes of one client were written into the network
        return False
    pairs = [(together[:, 0], alone[0]), (together[:3, 1], alone[1])]
    for at, (member, logits) in enumerate(zip((first, second), alone, strict=True)):
        own = torch.autograd.grad(logits.square().sum(), list(member.parameters()))
        pairs += [(stacked[at], each) for stacked, each in zip(whole, own, strict=True)]
    return all(bool((left - right).norm() <= 1e-6 * right.norm() + 1e-9) for left, right in pairs)
