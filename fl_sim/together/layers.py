"""Layers of several clients as one: each tensor gains a leading dimension, the clients' channels lie side by side.

A batch is [B, K·C, H, W]. A convolution takes K groups, batch normalisation K·C channels, whose statistics are each
client's own, and a linear layer is a batched matrix product: a client meets no number of another's. Batches of
different sizes are padded; padding counts in no statistic and gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass
class Lanes:
    """Whose turn it is: the first `count` clients; with padding, which rows of each are real, and how many."""

    count: int
    valid: Tensor | None = None
    """[B, count], 1 for a real row and 0 for padding, floats; None: all rows are real."""
    rows: Tensor | None = None
    """[count], the sums of `valid`."""


class Stacked(nn.Module):
    """One layer of several clients: parameters and buffers [K, ...], of which the first `lanes.count` are in use."""

    def __init__(self, layers: Sequence[nn.Module], lanes: Lanes) -> None:
        super().__init__()
        self.lanes = lanes
        self.whole: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, parameter in layers[0].named_parameters(recurse=False):
                self.whole[name] = _stack(self.own(layers, name), parameter)
            for name, _ in layers[0].named_buffers(recurse=False):
                self.whole[name] = torch.stack(self.own(layers, name))
        self._trained = {name for name, _ in layers[0].named_parameters(recurse=False)}
        self.narrow()

    @staticmethod
    def own(layers: Sequence[nn.Module], name: str) -> list[Tensor]:
        """Each layer's own tensor of that name, without the search that `getattr` makes of it."""
        where = "_parameters" if name in layers[0]._parameters else "_buffers"
        return [layer.__dict__[where][name] for layer in layers]

    def narrow(self) -> None:
        """Leave only the first clients in use, which share their memory with the whole."""
        for name, tensor in self.whole.items():
            part = tensor[: self.lanes.count]
            setattr(self, name, nn.Parameter(part) if name in self._trained else part)

    def side_by_side(self, name: str) -> Tensor | None:
        """A tensor of all clients with its first two dimensions made one; None for a bias that is not there."""
        tensor: Tensor | None = getattr(self, name, None)
        return None if tensor is None else tensor.flatten(0, 1)


def _stack(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """The tensors along a new first dimension, each in the memory format that it has."""
    stacked = torch.stack(tuple(tensors))
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        flat = stacked.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return flat.view(len(tensors), -1, *like.shape[1:])
    return stacked


class StackedConv(Stacked):
    """K convolutions as one of K times the groups."""

    def __init__(self, layers: Sequence[nn.Conv2d], lanes: Lanes) -> None:
        super().__init__(layers, lanes)
        first = layers[0]
        self.stride, self.padding, self.dilation = first.stride, first.padding, first.dilation
        self.groups = first.groups

    def forward(self, x: Tensor) -> Tensor:
        weight = self.side_by_side("weight")
        assert weight is not None
        bias, groups = self.side_by_side("bias"), self.lanes.count * self.groups
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)


class StackedLinear(Stacked):
    """K linear layers as one batched product."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.reshape(len(x), self.lanes.count, -1).transpose(0, 1)
        bias: Tensor | None = getattr(self, "bias", None)
        weight = self.weight.mT
        out = torch.bmm(inputs, weight) if bias is None else torch.baddbmm(bias[:, None], inputs, weight)
        return out.transpose(0, 1).flatten(1)


class StackedBatchNorm(Stacked):
    """K batch normalisations as one, each over its own client's real rows."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, layers: Sequence[nn.BatchNorm2d], lanes: Lanes) -> None:
        super().__init__(layers, lanes)
        momentum = layers[0].momentum
        assert momentum is not None
        self.eps, self.momentum = layers[0].eps, momentum

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.side_by_side("weight"), self.side_by_side("bias")
        mean, variance = self.running_mean.flatten(), self.running_var.flatten()  # views: updated in place
        if self.lanes.valid is None or self.lanes.rows is None:
            lone = x.shape[0] * x.shape[2] * x.shape[3] == 1  # has no variance: the running statistics serve
            self.num_batches_tracked += not lone
            return F.batch_norm(x, mean, variance, weight, bias, not lone, self.momentum, self.eps)
        assert weight is not None
        assert bias is not None
        counts = self.lanes.rows * (x.shape[2] * x.shape[3])
        self.num_batches_tracked += counts > 1
        channels = x.shape[1] // self.lanes.count
        valid = self.lanes.valid.repeat_interleave(channels, 1)
        values = counts.repeat_interleave(channels)
        out, own_mean, own_variance = normalised(x, weight, bias, valid, values, mean, variance, self.eps)
        with torch.no_grad():
            share = self.momentum * (values > 1).to(mean.dtype)
            mean += share * (own_mean - mean)
            variance += share * (own_variance * values / (values - 1).clamp(min=1) - variance)
        return out


class _Normalised(torch.autograd.Function):
    """Batch normalisation over the rows that are real, forward and backward as Ioffe & Szegedy (2015) write it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        valid: Tensor,
        values: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = x.to(weight.dtype)  # autocast hands over bfloat16
        lone = values == 1
        mean = torch.where(lone, running_mean, (exact.sum((2, 3)) * valid).sum(0) / values)
        centred = exact - _channels(mean)
        # Not `vector_norm`, which takes five times as long and more on channels-last memory.
        variance = (centred.square().sum((2, 3)) * valid).sum(0) / values
        inverse = (torch.where(lone, running_var, variance) + eps).rsqrt()
        # Where the running statistics serve, no gradient flows through them.
        ctx.save_for_backward(centred, weight, inverse, valid * ~lone / values)
        out = torch.addcmul(_channels(bias), centred, _channels(inverse * weight))
        ctx.mark_non_differentiable(mean, variance)
        memory = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        return out.to(x.dtype).contiguous(memory_format=memory), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        centred, weight, inverse, coupling = ctx.saved_tensors
        gradient = gradients[0].to(centred.dtype)
        total = gradient.sum((0, 2, 3))  # padding has no gradient, so it adds nothing
        along = (gradient * centred).sum((0, 2, 3))
        scale = inverse * weight
        through_mean = (coupling * total * scale)[:, :, None, None]
        through_variance = (coupling * along * inverse.square() * scale)[:, :, None, None]
        back = torch.addcmul(-through_mean, gradient, _channels(scale)).addcmul_(centred, through_variance, value=-1)
        return back.to(gradients[0].dtype), along * inverse, total, None, None, None, None, None


def _channels(values: Tensor) -> Tensor:
    return values[None, :, None, None]


def normalised(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    valid: Tensor,
    values: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation of x [B, C, H, W] over the rows where `valid` [B, C] is 1, with its means and variances.

    `values` [C] says how many numbers that is in each channel; one alone is normalised by the running statistics.
    What stands in the other rows is normalised alike and changes nothing.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Normalised.apply(
        x, weight, bias, valid, values, running_mean, running_var, eps
    )
    return result
