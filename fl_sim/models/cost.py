"""What a network costs: its parameters, and the multiply-adds of classifying one image."""

from __future__ import annotations

import torch

from fl_sim.models.classifier import Architecture


def cost(architecture: Architecture, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> tuple[int, int]:
    """(parameters, multiply-adds of one image) of convolutions, matrix products and attention; computes no numbers."""
    from torch.utils.flop_counter import FlopCounterMode  # imported late: it takes a while

    with torch.device("meta"):
        body, _ = architecture.body(shape, classes)
        image = torch.empty(1, *shape)
    with FlopCounterMode(display=False) as counter:
        body.eval()(image)
    return sum(parameter.numel() for parameter in body.parameters()), counter.get_total_flops() // 2
