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
