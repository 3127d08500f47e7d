"""A model's modules and tensors in PyTorch's order, found once for each model.

What `named_modules`, `named_parameters`, `named_buffers` and `state_dict` say, without going through the model every
time: an update of a client asks half a dozen times, and for a small one that took an eighth of its time.
"""

from __future__ import annotations

from functools import cached_property
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

PLACE = "_walk"
"""Where a model keeps its own, so that it goes when the model goes."""


class Walk:
    """What a walk through a model found. Copies of the model don't take it along."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[tuple[str, nn.Module]] = [
            (path, module) for path, module in model.named_modules() if module is not model
        ]
        """All below the model, by their paths, each once."""
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        """Those that are saved and of floating point."""
        seen: set[Tensor] = set()
        for path, module in (("", model), *self.modules):
            prefix = f"{path}." if path else ""
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter not in seen:
                    seen.add(parameter)
                    self.parameters[prefix + name] = parameter
            for name, buffer in module._buffers.items():
                if buffer is None or buffer in seen or name in module._non_persistent_buffers_set:
                    continue
                seen.add(buffer)
                if buffer.is_floating_point():
                    self.buffers[prefix + name] = buffer
        self._holders = [
            holder
            for module in (model, *(below for _, below in self.modules))
            for holder in (module._modules, module._parameters, module._buffers)
        ]
        self._lengths = [*map(len, self._holders)]
        self._full = [holder for holder in self._holders if holder]
        self._values = [holder.values() for holder in self._full]  # views, which show what is there now
        self._held, self._names = [*chain.from_iterable(self._values)], [*chain.from_iterable(self._full)]

    def __deepcopy__(self, memo: object) -> None:
        """A copied model makes its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Parameters first, then buffers."""
        return [*self.parameters.values(), *self.buffers.values()]

    @cached_property
    def layers(self) -> str:
        """What the modules are, in words: equal for models of equal architecture.

        Said once: a setting that is changed later (a dropout's rate, a stride) does not show.
        """
        return "\n".join(f"{path}:{type(module).__qualname__}({module.extra_repr()})" for path, module in self.modules)

    def fresh(self) -> bool:
        """Whether no module, parameter or buffer has been exchanged, renamed, added or taken away since."""
        return (
            [*map(len, self._holders)] == self._lengths
            and [*chain.from_iterable(self._full)] == self._names
            and all(map(is_, chain.from_iterable(self._values), self._held))
        )


def walk(model: nn.Module) -> Walk:
    """The model's walk: the last one, unless something in the model has been exchanged."""
    found = model.__dict__.get(PLACE)
    if not isinstance(found, Walk) or not found.fresh():
        found = model.__dict__[PLACE] = Walk(model)
    return found


def set_to_train(model: nn.Module, mode: bool = True) -> None:
    """`model.train(mode)`, where a part of it is not in that mode yet."""
    if model.training is not mode or any(module.training is not mode for _, module in walk(model).modules):
        model.train(mode)
