"""The training loop for several clients at once: each ends where `fl_sim.training.fit` would have brought it alone.

Every client has its own samples, batches, draws, number of steps and learning rate's course; what must be alike is
what `likeness` says. Those with the most steps come first, and whoever is done leaves the network.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim import SGD, Adam, AdamW, Optimizer

from fl_sim.augment import Augment
from fl_sim.models.classifier import Classifier
from fl_sim.samples import Samples, batch_sizes, to_pixels
from fl_sim.together.network import Crowd, is_watched, signature
from fl_sim.training import Fitted, Hook, Objective, Schedule, cross_entropy
from fl_sim.walk import set_to_train, walk

ELEMENTWISE = (SGD, Adam, AdamW)
"""Optimisers that treat every number by itself and whose step is proportional to the learning rate."""


@dataclass(frozen=True)
class Job:
    """What a client asked `fit` to do."""

    place: int
    """The client's place in its cohort."""
    model: nn.Module
    samples: Samples
    optimizer: Optimizer
    epochs: int
    batch_size: int
    rng: Generator
    objective: Objective = cross_entropy
    after_backward: tuple[Hook, ...] = ()
    after_step: tuple[Hook, ...] = ()
    after_epoch: tuple[Hook, ...] = ()
    min_steps: int = 0
    schedule: Schedule | None = None

    @property
    def steps(self) -> int:
        return max(self.epochs * len(batch_sizes(len(self.samples), self.batch_size)), self.min_steps)

    @cached_property
    def kind(self) -> Hashable | None:
        """Its likeness, as it was when somebody first asked."""
        return likeness(self)

    @property
    def size(self) -> tuple[int, int, int]:
        """Sorts jobs: most steps first, then most samples, then the cohort's order."""
        return -self.steps, -len(self.samples), self.place


def likeness(job: Job) -> Hashable | None:
    """Jobs of equal likeness can be trained together if their networks can be stacked; None: only alone.

    A hook, an objective or a transformation of its own may look at the client's model, which stacked training leaves
    alone until its end.
    """
    samples, groups = job.samples, job.optimizer.param_groups
    plain = job.objective is cross_entropy and not (job.after_backward or job.after_step or job.after_epoch)
    usual = type(samples) is Samples and all(type(transform) is Augment for transform in samples.transforms)
    if not (plain and usual and len(samples) and job.steps):
        return None
    fresh = type(job.optimizer) in ELEMENTWISE and len(groups) == 1 and not job.optimizer.state
    hooked = bool(job.optimizer._optimizer_step_pre_hooks or job.optimizer._optimizer_step_post_hooks)
    hooked = hooked or is_watched(job.model)
    own = [id(parameter) for parameter in walk(job.model).parameters.values()]
    if not fresh or hooked or own != [id(parameter) for parameter in groups[0]["params"]]:
        return None
    pace = _hyperparameters(job.optimizer)
    if any(isinstance(value, Tensor) for value in pace.values()):
        return None
    images, labels = samples.images, samples.labels
    data = images.shape[1:], images.dtype, labels.shape[1:], labels.dtype, images.device, samples.transforms
    return signature(job.model), type(job.optimizer).__name__, tuple(sorted(pace.items())), job.batch_size, data


def _hyperparameters(optimizer: Optimizer) -> dict[str, Any]:
    """What its constructor would be given."""
    kind: Any = type(optimizer)
    accepted = _accepted(kind)
    return {name: value for name, value in optimizer.param_groups[0].items() if name in accepted}


@cache
def _accepted(kind: type[Optimizer]) -> frozenset[str]:
    return frozenset(inspect.signature(kind).parameters) - {"params"}


def again(optimizer: Optimizer, parameters: list[nn.Parameter]) -> Optimizer:
    """A fresh optimiser of the same kind and hyperparameters, for other parameters."""
    kind: Any = type(optimizer)
    fresh: Optimizer = kind(parameters, **_hyperparameters(optimizer))
    return fresh


def train_together(jobs: Sequence[Job]) -> list[Fitted]:
    """Train all jobs, which must be alike; models and optimisers change only when everything has gone well."""
    order = sorted(range(len(jobs)), key=lambda at: jobs[at].size)
    fitted = dict(zip(order, _Training([jobs[at] for at in order]).run(), strict=True))
    return [fitted[at] for at in range(len(jobs))]


class _Training:
    """One training of jobs that stand in the order of their `size`."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._crowd = Crowd([job.model for job in jobs if isinstance(job.model, Classifier)])
        self._optimizer = again(jobs[0].optimizer, self._crowd.parameters())
        self._rate = jobs[0].optimizer.param_groups[0]["lr"]
        self._factors = [1.0] * len(jobs)
        self._draws = [_epochs(job) for job in jobs]
        samples = [job.samples for job in jobs]
        self._images, self._labels = (torch.cat([getattr(s, name) for s in samples]) for name in ("images", "labels"))
        counts = torch.tensor([0, *(len(each) for each in samples)])
        self._starts = counts.cumsum(0)[:-1]
        self._device = self._images.device
        self._losses = torch.zeros(len(jobs), device=self._device)
        self._in_epoch = [0] * len(jobs)
        self._states: list[list[dict[str, Any]]] = []

    def run(self) -> list[Fitted]:
        count = len(self._jobs)
        for step in range(self._jobs[0].steps):
            while self._jobs[count - 1].steps <= step:
                count -= 1
            if count < self._crowd.lanes.count:
                self._narrow(count)
            self._step(step, [next(draw) for draw in self._draws[:count]])
        self._narrow(0)
        self._hand_back()
        losses = self._losses.tolist()
        sums = zip(self._jobs, losses, self._in_epoch, strict=True)
        return [Fitted(job.steps, loss / max(in_epoch, 1)) for job, loss, in_epoch in sums]

    def _step(self, step: int, batches: Sequence[_Batch]) -> None:
        self._note_epochs(batches)
        x, y, valid = self._assembled(batches)
        self._optimizer.zero_grad(set_to_none=True)
        logits = self._crowd(x, valid)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(0, 1), reduction="none").view(y.shape[:2])
        means = losses.mean(0) if valid is None else (losses * valid).sum(0) / valid.sum(0)
        means.sum().backward()
        self._update(step, len(batches))
        self._losses[: len(batches)] += means.detach()

    def _note_epochs(self, batches: Sequence[_Batch]) -> None:
        """A client's loss is that of its last epoch: sums begin anew with every epoch."""
        begins = [batch.first for batch in batches]
        self._in_epoch[: len(batches)] = [
            1 if first else done + 1 for first, done in zip(begins, self._in_epoch, strict=False)
        ]
        if any(begins):
            self._losses[: len(batches)].masked_fill_(self._there(torch.tensor(begins)), 0)

    def _assembled(self, batches: Sequence[_Batch]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pixels [B, K, C, H, W], labels [B, K] and, unless all batches are of one size, which of them are real.

        A batch is padded with its own first sample: nothing that could be larger than what is there already.
        """
        positions = pad_sequence([batch.indices for batch in batches], padding_value=-1)  # [B, K]
        real = positions >= 0
        ragged = not bool(real.all())  # on the CPU, as all draws are
        at = torch.where(real, positions, positions[:1]) + self._starts[: len(batches)]
        at = self._there(at)
        pixels, labels = to_pixels(self._images[at.flatten()]), self._labels[at]
        for number, transform in enumerate(self._jobs[0].samples.transforms):
            assert isinstance(transform, Augment)
            drawn = [batch.draws[number] for batch in batches]
            together = {name: pad_sequence([each[name] for each in drawn]).flatten(0, 1) for name in drawn[0]}
            pixels = transform.apply(pixels, {name: self._there(each) for name, each in together.items()})
        return pixels.unflatten(0, at.shape), labels, self._there(real).to(pixels.dtype) if ragged else None

    def _there(self, drawn: Tensor) -> Tensor:
        """On the device, which goes on with what it does meanwhile."""
        return drawn.to(self._device, non_blocking=True)

    def _update(self, step: int, count: int) -> None:
        """One step of the optimiser, by each client's own learning rate."""
        for at, job in enumerate(self._jobs[:count]):
            if job.schedule is not None:
                self._factors[at] = job.schedule(step / job.steps)
        factors = self._factors[:count]
        [group] = self._optimizer.param_groups
        if len(set(factors)) == 1:
            group["lr"] = self._rate * factors[0]
            self._optimizer.step()
            return
        # Steps are proportional to the rate: take a whole one and go back as far as the factor says.
        group["lr"] = self._rate
        before = [parameter.detach().clone() for parameter in group["params"]]
        self._optimizer.step()
        with torch.no_grad():
            for parameter, start in zip(group["params"], before, strict=True):
                share = self._there(torch.tensor(factors, dtype=start.dtype))
                parameter.copy_(start.lerp(parameter, share.view(-1, *[1] * (start.dim() - 1))))

    def _narrow(self, count: int) -> None:
        """Take those out who are done, with what the optimiser remembers of them."""
        leaving = range(count, self._crowd.lanes.count)
        [group] = self._optimizer.param_groups
        states = [self._optimizer.state.pop(parameter, {}) for parameter in group["params"]]
        shapes = [parameter.shape for parameter in group["params"]]
        self._states[:0] = [
            [
                {name: _own(value, at, shape) for name, value in state.items()}
                for state, shape in zip(states, shapes, strict=True)
            ]
            for at in leaving
        ]
        if not count:
            return
        self._crowd.narrow(count)
        group["params"] = self._crowd.parameters()
        for parameter, state, shape in zip(group["params"], states, shapes, strict=True):
            if state:
                self._optimizer.state[parameter] = {
                    name: value[:count] if _belongs(value, shape) else value for name, value in state.items()
                }

    def _hand_back(self) -> None:
        """Leave every client's model and optimiser as its own training would have left them."""
        self._crowd.hand_back()
        for job, states, factor in zip(self._jobs, self._states, self._factors, strict=True):
            [group] = job.optimizer.param_groups
            group["lr"] = group["lr"] * factor
            for parameter, state in zip(group["params"], states, strict=True):
                if state:
                    job.optimizer.state[parameter] = state
            set_to_train(job.model)


def _belongs(value: Any, shape: torch.Size) -> bool:
    """Whether an entry of the optimiser's state has a part for each client; the others are counters."""
    return isinstance(value, Tensor) and value.shape == shape


def _own(value: Any, at: int, shape: torch.Size) -> Any:
    if _belongs(value, shape):
        return value[at]
    return value.clone() if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class _Batch:
    """One batch of one client: which samples, and what augmentation drew for them."""

    indices: Tensor
    first: bool
    """Whether an epoch begins with it."""
    draws: list[dict[str, Tensor]] = field(default_factory=list)


def _epochs(job: Job) -> Iterator[_Batch]:
    """A client's batches without end, drawn as `Samples.batches` draws them."""
    samples = job.samples
    side = samples.images.shape[2], samples.images.shape[3]
    augments = [transform for transform in samples.transforms if isinstance(transform, Augment)]
    sizes = batch_sizes(len(samples), job.batch_size)
    while True:
        order = torch.randperm(len(samples), generator=job.rng)
        for number, indices in enumerate(order.split(sizes)):
            yield _Batch(indices, not number, [each.draw(len(indices), side, job.rng) for each in augments])
