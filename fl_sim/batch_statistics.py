"""Batch normalisation's running statistics: kept still for a while, or measured anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, nn

from fl_sim.samples import Samples

STATISTICS_BATCH = 256


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The model's batch normalisations, in order; a vision transformer has none."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Forward passes in train mode that normalise by the batch but leave no trace in the running statistics."""
    tracking = [norm for norm in batch_norms(model) if norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


@torch.no_grad()
def measure_statistics(model: nn.Module, samples: Samples, rng: Generator, size: int = STATISTICS_BATCH) -> None:
    """Replace the running statistics by the plain mean over one pass of batches; weights put together need it."""
    norms = batch_norms(model)
    if not norms:
        return
    was_training, momenta = model.training, [norm.momentum for norm in norms]
    model.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
    for x, _ in samples.batches(size, rng):
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)
