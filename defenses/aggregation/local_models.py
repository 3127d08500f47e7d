"""Clients' models behind their updates, for rules that look inside them.

Only parameters reach an aggregation rule, so a client's model runs with the global model's batch statistics.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext
from fl_sim.samples import Samples

BATCH = 1024


def global_model(ctx: ServerContext, buffers: Tensor | None = None) -> Classifier:
    """The model before this round's step, in evaluation mode; other batch statistics if given."""
    model = ctx.new_model()
    vector = ctx.vector if buffers is None else torch.cat([ctx.vector[: ctx.layout.parameters], buffers])
    ctx.layout.load(model, vector)
    return model.eval()


def local_models(deltas: Tensor, ctx: ServerContext, buffers: Tensor | None = None) -> Iterator[Classifier]:
    """One client's model after the other, in one model object."""
    model = global_model(ctx, buffers)
    vector = ctx.layout.read(model)
    split = ctx.layout.parameters
    for delta in deltas:
        vector[:split] = ctx.vector[:split] + delta
        ctx.layout.load(model, vector)
        yield model


def head_columns(ctx: ServerContext) -> tuple[slice, slice]:
    """Where the last linear layer's weights and biases stand among the parameters."""
    model = ctx.new_model()
    head = model.head
    places: dict[int, slice] = {}
    start = 0
    for parameter in model.parameters():
        places[id(parameter)] = slice(start, start + parameter.numel())
        start += parameter.numel()
    return places[id(head.weight)], places[id(head.bias)]


@torch.no_grad()
def outputs(model: Classifier, images: Tensor) -> Tensor:
    """Logits of images, in batches."""
    return torch.cat([model(part) for part in images.split(BATCH)])


@torch.no_grad()
def representations(model: Classifier, samples: Samples) -> Tensor:
    """What the last linear layer is given, [N, D]."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(1).float())

    hook = model.head.register_forward_pre_hook(keep)
    try:
        for pixels, _ in samples.chunks(BATCH):
            model(pixels)
    finally:
        hook.remove()
    return torch.cat(seen)
