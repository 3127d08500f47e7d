"""A model's tensors, found once: what PyTorch says, and found anew when something was exchanged."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn
from toys import small_model

from fl_sim.walk import set_to_train, walk


class Shared(nn.Module):
    """One convolution under two names, a counter, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.again = self.first
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("mean", torch.zeros(3), persistent=False)


@pytest.mark.parametrize("make", [small_model, Shared, lambda: nn.Linear(2, 3)])
def test_what_pytorch_says(make: Callable[[], nn.Module]) -> None:
    model = make()
    found = walk(model)
    assert list(found.parameters.items()) == list(model.named_parameters())
    saved = {name: b for name, b in model.named_buffers() if name in model.state_dict() and b.is_floating_point()}
    assert list(found.buffers) == list(saved)
    assert all(found.buffers[name] is saved[name] for name in saved)
    assert [module for _, module in found.modules] == [module for module in model.modules() if module is not model]


def exchange_parameter(model: Shared) -> None:
    model.first.bias = nn.Parameter(torch.ones(3))


def exchange_layer(model: Shared) -> None:
    model.norm = nn.BatchNorm2d(3)


def add_layer(model: Shared) -> None:
    model.head = nn.Linear(3, 2)


def take_parameter_away(model: Shared) -> None:
    model.first.bias = None


def exchange_buffer(model: Shared) -> None:
    model.norm.running_mean = torch.ones(3)


@pytest.mark.parametrize(
    "change", [exchange_parameter, exchange_layer, add_layer, take_parameter_away, exchange_buffer]
)
def test_an_exchange_is_noticed(change: Callable[[Shared], None]) -> None:
    model = Shared()
    before = walk(model)
    assert walk(model) is before
    change(model)
    found = walk(model)
    assert found is not before
    assert [id(tensor) for tensor in found.parameters.values()] == [id(tensor) for tensor in model.parameters()]
    assert all(found.buffers[name] is model.get_buffer(name) for name in found.buffers)


def test_a_copy_has_a_walk_of_its_own_and_none_keeps_its_model_alive() -> None:
    model = small_model()
    copy = deepcopy(model)
    assert not {id(tensor) for tensor in walk(model).tensors} & {id(tensor) for tensor in walk(copy).tensors}
    gone = weakref.ref(copy)
    del copy
    gc.collect()
    assert gone() is None


class Hearing(Shared):
    """Has a hook of its own on one of its parts, which so refers back to it."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[torch.Tensor] = []
        self.first.register_forward_hook(self.hear)

    def hear(self, _layer: nn.Module, _given: object, output: torch.Tensor) -> None:
        self.heard.append(output)


def test_a_model_that_hears_itself_goes_as_well() -> None:
    """Its walk belongs to it: nothing outside keeps it alive."""
    model = Hearing()
    walk(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_training_mode_reaches_every_part() -> None:
    model = small_model().eval()
    set_to_train(model)
    assert all(module.training for module in model.modules())
    [*model.modules()][-1].eval()
    set_to_train(model)
    assert all(module.training for module in model.modules())
