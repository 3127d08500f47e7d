"""Pruning that keeps the layout: channels and units are switched off by factors on the model's own parameters.

Factors map a parameter's name to a tensor that broadcasts with it: a mask on a batch normalisation's γ switches
channels off, one on the columns of the last layer's weight switches off units of the feature map before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_sim.distillation import frozen_copy, with_features
from fl_sim.errors import require
from fl_sim.metrics import CHUNK, accuracy
from fl_sim.models.classifier import Classifier
from fl_sim.samples import Samples

Factors: TypeAlias = Mapping[str, Tensor]


def named_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The batch normalisations with a γ, by name."""
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.BatchNorm2d) and each.affine}


def require_norms(model: nn.Module) -> None:
    """Refuse a model without batch normalisation, whose channels can't be masked."""
    require(bool(named_norms(model)), "", "a model without BatchNorm2d", "works on batch-normalised channels only")


def masked_logits(model: nn.Module, x: Tensor, factors: Factors) -> Tensor:
    """A forward pass with each named parameter times its factor; gradients reach both."""
    parameters = dict(model.named_parameters())
    logits: Tensor = functional_call(model, {name: parameters[name] * f for name, f in factors.items()}, (x,))
    return logits


def scaled(model: Classifier, factors: Factors) -> Classifier:
    """A copy of the model with the factors multiplied in."""
    copy = deepcopy(model)
    parameters = dict(copy.named_parameters())
    with torch.no_grad():
        for name, factor in factors.items():
            parameters[name].mul_(factor)
    return copy


def thresholded(model: Classifier, masks: Factors, threshold: float) -> Classifier:
    """A copy in which every parameter whose mask is at most the threshold is zero."""
    return scaled(model, {name: (mask > threshold).to(mask.dtype) for name, mask in masks.items()})


def prune(model: Classifier, masks: Factors, validation: Samples, tolerance: float, limit: float = 1.0) -> Classifier:
    """A copy pruned at the largest threshold that costs at most a share `tolerance` of the held-out accuracy.

    The masks' own values below `limit` are the thresholds there are. Found by bisection: accuracy falls, but for the
    noise of a small sample, as the threshold rises. If even the smallest costs too much, nothing is pruned.
    """
    floor = (1 - tolerance) * accuracy(model, validation)
    values = torch.cat([mask.flatten() for mask in masks.values()]).unique().tolist()
    thresholds = [value for value in values if value < limit]
    best, low, high = deepcopy(model), 0, len(thresholds)
    while low < high:
        middle = (low + high + 1) // 2
        candidate = thresholded(model, masks, thresholds[middle - 1])
        if accuracy(candidate, validation) >= floor:
            best, low = candidate, middle
        else:
            high = middle - 1
    return best


# Units of the last feature map ----------------------------------------------------------------------------------------

PASSING = (
    *(nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.MaxPool2d),
    *(nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d),
)
"""What may stand between the last feature map and the last layer without mixing channels."""


def last_map(model: Classifier, x: Tensor) -> Tensor:
    """The feature map [B, D, H, W] whose channels are the last layer's inputs; a `ConfigError` if there is none."""
    seen: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, _inputs: object, output: Tensor) -> None:
        seen.append((module, output))

    leaves = [module for module in model.body.modules() if not any(module.children())]
    hooks = [leaf.register_forward_hook(keep) for leaf in leaves]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    found = next(out for module, out in reversed(seen) if module is not model.head and not isinstance(module, PASSING))
    usable = found.ndim == 4 and found.shape[1] == model.head.in_features
    require(usable, "", "a model whose last layer reads no channels of a feature map", "needs a convolutional network")
    return found.float()


@torch.no_grad()
def require_last_map(model: Classifier) -> None:
    """Refuse a model that `last_map` can't serve."""
    was_training = model.training
    try:
        last_map(model.eval(), torch.zeros(1, *model.shape, device=model.mean.device))
    finally:
        model.train(was_training)


def head_weight(model: Classifier) -> str:
    """The name of the last layer's weight."""
    return next(name for name, parameter in model.named_parameters() if parameter is model.head.weight)


@torch.no_grad()
def units_to_keep(model: Classifier, order: Tensor, validation: Samples, tolerance: float) -> Tensor:
    """Which of the last layer's inputs to keep [D], as 0 or 1: they go in `order` until accuracy has fallen too far.

    The features are taken once; each further unit costs no more than one product with the last layer's weight.
    """
    frozen = frozen_copy(model)
    features, head = torch.cat([with_features(frozen, x)[1] for x, _ in validation.chunks(CHUNK)]), frozen.head
    logits = features @ head.weight.T + head.bias
    floor = (1 - tolerance) * float((logits.argmax(1) == validation.labels).float().mean())
    keep = torch.ones(head.in_features, device=features.device)
    for unit in order.tolist():
        logits = logits - features[:, unit, None] * head.weight[:, unit]
        if float((logits.argmax(1) == validation.labels).float().mean()) < floor:
            break
        keep[unit] = 0
    return keep
