"""A model as one flat vector, and what stands where in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

# In one call what takes one for each tensor otherwise; data parallel training is made of them.
from torch._utils import _flatten_dense_tensors as flatten
from torch._utils import _unflatten_dense_tensors as unflatten

from fl_sim.walk import walk


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a model lies in its flat vector: all parameters first, then the floating-point buffers.

    Integer buffers (batch normalisation's counters) are left out: they stay where the model is.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    parameters: int
    """How many leading entries are parameters; the rest are buffers (batch normalisation's statistics)."""

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        found = walk(model)
        return cls(
            names=(*found.parameters, *found.buffers),
            shapes=tuple(tuple(tensor.shape) for tensor in found.tensors),
            parameters=sum(tensor.numel() for tensor in found.parameters.values()),
        )

    @cached_property
    def size(self) -> int:
        return sum(self._lengths)

    @cached_property
    def _sizes(self) -> list[torch.Size]:
        return [torch.Size(shape) for shape in self.shapes]

    @cached_property
    def _lengths(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    def read(self, model: nn.Module) -> Tensor:
        """A fresh vector of the model's parameters and buffers."""
        with torch.no_grad():
            flat: Tensor = flatten(tensors := walk(model).tensors)
            return flat if len(tensors) > 1 else flat.clone()  # of one it makes a view

    def load(self, model: nn.Module, vector: Tensor) -> None:
        """Copy a vector into the model, in place."""
        tensors = walk(model).tensors
        self._check(vector)
        if [tensor.shape for tensor in tensors] != self._sizes:
            raise ValueError("the model is not of this layout")
        with torch.no_grad():
            torch._foreach_copy_(tensors, unflatten(vector, tensors))

    def parts(self, vector: Tensor) -> list[Tensor]:
        """Views of the vector in the tensors' shapes."""
        self._check(vector)
        flat = vector.split(self._lengths)
        return [part.view(size) for part, size in zip(flat, self._sizes, strict=True)]

    def _check(self, vector: Tensor) -> None:
        if vector.shape != (self.size,):
            raise ValueError(f"the layout has {self.size} entries, the vector has shape {tuple(vector.shape)}")

    def clamp_variances(self, vector: Tensor) -> None:
        """Raise negative running variances to zero, in place: a sum of weighted deltas may leave them below it."""
        for name, part in zip(self.names, self.parts(vector), strict=True):
            if name.endswith("running_var"):
                part.clamp_(min=0)
