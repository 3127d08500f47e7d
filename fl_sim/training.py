"""The one training loop: benign clients, attacks, erasers and baselines differ by an objective or a hook."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from fl_sim.samples import Samples, batch_sizes
from fl_sim.walk import set_to_train, walk

Objective: TypeAlias = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, pixels, labels) -> a scalar loss."""
Hook: TypeAlias = Callable[[nn.Module], None]
Step: TypeAlias = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, pixels, labels) -> the loss, the model being a step further."""
Schedule: TypeAlias = Callable[[float], float]
"""Share of all steps done, in [0, 1) -> factor on the learning rate."""


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The plain classification loss."""
    return F.cross_entropy(model(x), y)


def decayed(factor: float, every: float, times: float = math.inf) -> Schedule:
    """Multiply the learning rate by `factor` each time another share `every` of the steps is done, `times` at most."""
    # The slack keeps 3 · 0.2 = 0.6000000000000001 in its own stage.
    return lambda progress: float(factor ** min(math.floor(progress / every + 1e-9), times))


@dataclass(frozen=True)
class Fitted:
    """What a training did: its optimiser steps and the mean loss over the last epoch."""

    steps: int
    loss: float


def stepped(
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    y: Tensor,
    objective: Objective = cross_entropy,
    after_backward: Iterable[Hook] = (),
    after_step: Iterable[Hook] = (),
) -> Tensor:
    """One step on one batch; its loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = objective(model, x, y)
    loss.backward()
    for hook in after_backward:
        hook(model)
    optimizer.step()
    for hook in after_step:
        hook(model)
    return loss.detach()


def fit(
    model: nn.Module,
    samples: Samples,
    optimizer: Optimizer,
    *,
    epochs: int,
    batch_size: int,
    rng: Generator,
    objective: Objective = cross_entropy,
    after_backward: Iterable[Hook] = (),
    after_step: Iterable[Hook] = (),
    after_epoch: Iterable[Hook] = (),
    min_steps: int = 0,
    schedule: Schedule | None = None,
    step: Step | None = None,
) -> Fitted:
    """Train `model` in place for `epochs`, and on for whole or part epochs until `min_steps` are done.

    Hooks run after each backward pass, each optimiser step, and each epoch, the last one whole or not. `step` makes
    a whole step in place of objective, optimiser and the first two hooks; the optimiser says its learning rate.
    """
    if not len(samples):
        raise ValueError("can't train on no samples")
    after_backward, after_step, after_epoch = tuple(after_backward), tuple(after_step), tuple(after_epoch)
    total = max(epochs * len(batch_sizes(len(samples), batch_size)), min_steps)
    rates = [group["lr"] for group in optimizer.param_groups]
    set_to_train(model)
    done, factor = 0, 1.0
    losses = torch.zeros((), device=samples.labels.device)
    in_epoch = 0
    while done < total:
        losses.zero_()
        in_epoch = 0
        for x, y in samples.batches(batch_size, rng):
            if schedule is not None and (now := schedule(done / total)) != factor:
                factor = now
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            if step is None:
                losses += stepped(model, optimizer, x, y, objective, after_backward, after_step)
            else:
                losses += step(model, x, y)
            done += 1
            in_epoch += 1
            if done == total:
                break
        for hook in after_epoch:
            hook(model)
    return Fitted(done, float(losses) / max(in_epoch, 1))


def sgd(
    model: nn.Module, lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False
) -> SGD:
    """Plain SGD over all trainable parameters, fused: one call a step instead of one a tensor."""
    trainable = [parameter for parameter in walk(model).parameters.values() if parameter.requires_grad]
    return SGD(
        trainable, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov and momentum > 0, fused=True
    )
