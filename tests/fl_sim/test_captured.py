"""Steps that are recorded once and replayed: the numbers of `fit`. Without a GPU, a recording does its work anew."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from toys import seeded, small_model, spotted

from fl_sim.annealing import cosine
from fl_sim.captured import WARM, Captured, Work
from fl_sim.layout import Layout
from fl_sim.training import Fitted, fit, sgd


class Recorder:
    """Stands in for CUDA graphs: takes work down, counts the recordings and the replays."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, work: Work) -> Work:
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            work()

        return replay


def updates(train: Callable[..., Fitted], model: nn.Module, sizes: tuple[int, ...], **options: Any) -> list[Any]:
    """What several clients make of one model, each loaded in place; their losses."""
    layout, found = Layout.of(model), []
    start = layout.read(model)
    for place, size in enumerate(sizes):
        layout.load(model, start)
        optimizer = sgd(model, 0.1, momentum=options.get("momentum", 0.0), nesterov=options.get("nesterov", False))
        more = {name: value for name, value in options.items() if name not in ("momentum", "nesterov")}
        fitted = train(model, spotted(size), optimizer, epochs=3, batch_size=8, rng=seeded(place), **more)
        found.append((fitted.steps, fitted.loss, layout.read(model)))
    return found


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"schedule": cosine}, {"min_steps": 11}]
)
def test_clients_train_as_by_fit(options: dict[str, Any]) -> None:
    """Bit for bit: full batches replayed, rests between them not, nothing of a client left for the next."""
    recorder = Recorder()
    model = small_model()
    sizes = (24, 19, 5, 16)
    ours = updates(Captured(recorder, "cpu"), deepcopy(model), sizes, **options)
    theirs = updates(fit, deepcopy(model), sizes, **options)
    for (steps, loss, vector), (own_steps, own_loss, own_vector) in zip(ours, theirs, strict=True):
        assert (steps, loss) == (own_steps, own_loss)
        assert torch.equal(vector, own_vector)
    assert recorder.recordings == 1
    full = sum(n // 8 * 3 for n in sizes)
    assert recorder.replays >= full - WARM > 0


def test_what_may_look_at_a_step_is_not_recorded() -> None:
    """Hooks, another objective, another optimiser, one that remembers something, another device: all by `fit`."""
    recorder, seen = Recorder(), list[int]()
    train = Captured(recorder, "cpu")
    model = small_model()

    def other(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return net(x).square().mean()

    updates(train, model, (40,), after_step=[lambda _: seen.append(1)])
    updates(train, model, (40,), after_backward=[lambda _: seen.append(1)])
    updates(train, model, (40,), objective=other)
    assert len(seen) == 30
    train(model, spotted(40), torch.optim.Adam(model.parameters()), epochs=2, batch_size=8, rng=seeded())
    used = sgd(model, 0.1, momentum=0.5)
    fit(model, spotted(8), used, epochs=1, batch_size=8, rng=seeded())
    train(model, spotted(40), used, epochs=2, batch_size=8, rng=seeded())
    assert recorder.recordings == 0
    on_gpus_only = Captured(recorder)
    assert updates(on_gpus_only, model, (40,))[0][0] == 15
    assert recorder.recordings == 0
    updates(train, model, (40,))
    assert recorder.recordings == 1


@pytest.mark.parametrize("change", ["buffer", "format", "weights"])
def test_a_recording_is_made_anew_where_the_memory_is_another(change: str) -> None:
    """A graph would go on computing with what it was recorded on."""
    recorder, model = Recorder(), small_model()
    train = Captured(recorder, "cpu")
    updates(train, model, (40,))
    if change == "buffer":
        norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        norm.running_mean = torch.ones_like(norm.running_mean)
    elif change == "format":
        model.to(memory_format=torch.contiguous_format)
    else:
        model.double().float()
    updates(train, model, (40,))
    assert recorder.recordings == 2


def test_who_looks_on_at_the_model_sees_every_step() -> None:
    recorder, model, seen = Recorder(), small_model(), list[int]()
    model.head.register_forward_hook(lambda *_: seen.append(1))
    updates(Captured(recorder, "cpu"), model, (40,))
    assert (recorder.recordings, len(seen)) == (0, 15)


def test_a_model_that_is_gone_is_forgotten() -> None:
    train = Captured(lambda work: lambda: None, "cpu")  # like a graph, this holds nothing of the work
    model = small_model()
    updates(train, model, (40,))
    assert len(train._steps) == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert not train._steps
