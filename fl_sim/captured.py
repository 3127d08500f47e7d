"""A step of training as a CUDA graph: recorded once, replayed for every client and round.

A step of a small or middling network is hundreds of short kernels, and launching them takes longer than they do. A
graph launches them all at once. Recorded are whole steps of plain training, batches of the full size only; everything
else, and what comes before the recording, goes the usual way, on the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Generator, Tensor, nn
from torch.optim import SGD, Optimizer

from fl_sim.samples import Samples
from fl_sim.together.network import is_watched
from fl_sim.training import Fitted, Hook, Objective, Schedule, cross_entropy, fit, stepped
from fl_sim.walk import walk

Work: TypeAlias = Callable[[], None]
Record: TypeAlias = Callable[[Work], Work]
"""Takes work down without doing it -> what does it."""

WARM = 4
"""Steps of a kind that are made the usual way first, so that libraries have chosen and allocated what they need."""


def recorded(work: Work) -> Work:
    """The work as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    # The server's thread may go on using the GPU; clients are on one thread, as the engine sees to.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return partial(_replay, graph)


def _replay(graph: torch.cuda.CUDAGraph) -> None:
    graph.replay()


class Captured:
    """`fit` for one thread, replaying steps that it has recorded; plain `fit` elsewhere and where hooks look on.

    The same kernels on the same values in the same order, but for the learning rate, which graphs read in single
    precision: results may differ from `fit`'s in their last bits.
    """

    def __init__(self, record: Record = recorded, device: str = "cuda") -> None:
        self._record, self._device = record, device
        self._steps: WeakKeyDictionary[nn.Module, dict[Hashable, _Step]] = WeakKeyDictionary()

    def __call__(
        self,
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
    ) -> Fitted:
        hooks = tuple(after_backward), tuple(after_step)
        train = partial(
            fit,
            model,
            samples,
            epochs=epochs,
            batch_size=batch_size,
            rng=rng,
            after_epoch=after_epoch,
            min_steps=min_steps,
            schedule=schedule,
        )
        usable = samples.labels.device.type == self._device and _plain(optimizer)
        usable = usable and not is_watched(model)  # a graph would not call who looks on
        if objective is not cross_entropy or any(hooks) or not usable:
            return train(optimizer, objective=objective, after_backward=hooks[0], after_step=hooks[1])
        step = self._step_of(model, optimizer, batch_size)
        step.begin(optimizer)
        return train(optimizer, step=step)

    def _step_of(self, model: nn.Module, optimizer: Optimizer, batch_size: int) -> _Step:
        [group] = optimizer.param_groups
        pace = {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        # A graph computes with the memory that it was recorded on, by the layers as they were.
        memory = ((tensor.data_ptr(), tensor.stride()) for tensor in walk(model).tensors)
        layers = str(getattr(model, "compute", None)), walk(model).layers
        kind = (*sorted(pace.items()), *map(id, group["params"]), *memory, layers, batch_size)
        known = self._steps.setdefault(model, {})
        if kind not in known:
            known[kind] = _Step(group["params"], pace, batch_size, self._record)
        return known[kind]


def _plain(optimizer: Optimizer) -> bool:
    """Whether it is SGD at its beginning, one fused call for all parameters, in float32 as the rate's tensor is."""
    groups = optimizer.param_groups
    if type(optimizer) is not SGD or len(groups) != 1 or not groups[0]["fused"] or optimizer.state:
        return False
    return all(parameter.dtype == torch.float32 for parameter in groups[0]["params"]) and not groups[0]["dampening"]


class _Step:
    """One step, by an optimiser of its own with a learning rate that graphs can read; never holds the model."""

    def __init__(self, parameters: list[nn.Parameter], pace: dict[str, Any], size: int, record: Record) -> None:
        rate = torch.zeros((), device=parameters[0].device)
        self._optimizer = SGD(parameters, lr=rate, **pace)
        self._size, self._record = size, record
        self._made, self._rate = 0, 0.0
        self._replay: Work | None = None

    def begin(self, asked: Optimizer) -> None:
        """Do as a fresh optimiser would, the one that was asked for."""
        [self._asked] = asked.param_groups
        for state in self._optimizer.state.values():
            buffer = state.get("momentum_buffer")
            if buffer is not None:
                buffer.zero_()  # μ · 0 + g: what the first step of a fresh one remembers

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Make the step; its loss, which the next one overwrites."""
        [group] = self._optimizer.param_groups
        if self._rate != (rate := self._asked["lr"]):
            self._rate = rate
            group["lr"].fill_(rate)
        if len(x) != self._size or self._made < WARM:
            self._made += len(x) == self._size
            return stepped(model, self._optimizer, x, y)
        if self._replay is None:
            self._x, self._y = x.clone(), y.clone()
            self._loss = torch.zeros((), device=x.device)
            self._optimizer.zero_grad(set_to_none=True)  # gradients of the graph's own
            self._replay = self._record(partial(self._work, model))
        self._x.copy_(x)
        self._y.copy_(y)
        self._replay()
        return self._loss

    def _work(self, model: nn.Module) -> None:
        self._loss.copy_(stepped(model, self._optimizer, self._x, self._y))
