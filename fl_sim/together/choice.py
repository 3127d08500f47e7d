"""How many clients to train as one: as many as pays, by the clock."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from fl_sim.samples import to_pixels
from fl_sim.together.network import unfit
from fl_sim.together.training import Job, again, train_together
from fl_sim.training import Fitted, fit

TRIED_STEPS, TRIED_SECONDS = 3, 0.1
LONGEST_TRIAL = 20
"""Seconds: what a trial may be expected to take."""
WORTH = 0.95
"""A larger stack must need this share of the time or less: no change over a whim of the clock."""
MEMORY_SHARE = 0.25
"""Of the free memory, what all stacks in training may take."""


@dataclass(frozen=True)
class Choice:
    """How jobs of one kind are trained, and why."""

    model: str
    batch_size: int
    optimizer: str
    clients: int
    """Trained as one; 1: each alone."""
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)
    """What each number of clients needed for a client's step, as far as it was tried."""

    def __post_init__(self) -> None:
        if type(self.clients) is not int or self.clients < 1:  # read from a file
            raise ValueError(f"clients={self.clients!r} is no number of clients")


class Choices:
    """The choices of a run, made when jobs of a kind first turn up, and kept for the rest of it."""

    def __init__(
        self,
        clients: int | Literal["auto"],
        workers: int,
        known: Mapping[str, Mapping[str, Any]],
        note: Callable[[dict[str, Any]], None],
    ) -> None:
        self._clients, self._workers, self._note = clients, workers, note
        self._made = {kind: Choice(**values) for kind, values in known.items()}
        self._kinds: dict[Hashable, str] = {}

    def clients_of(self, likeness: Hashable, jobs: Sequence[Job]) -> int:
        """How many of these jobs, alike, are trained as one."""
        kind = self._kind_of(likeness)
        if kind not in self._made:
            self._made[kind] = self._choose(sorted(jobs, key=lambda job: job.size))
            self._note({name: asdict(choice) for name, choice in self._made.items()})
        return self._made[kind].clients

    def is_alone(self, likeness: Hashable | None) -> bool:
        """Whether a job is known to train by itself, so that nobody need wait for it, nor it for anybody."""
        made = self._made.get(self._kind_of(likeness)) if likeness is not None else None
        return likeness is None or (made is not None and made.clients == 1)

    def _kind_of(self, likeness: Hashable) -> str:
        """The name under which a choice is noted: the same in every process."""
        if likeness not in self._kinds:
            self._kinds[likeness] = hashlib.sha256(repr(likeness).encode()).hexdigest()[:16]
        return self._kinds[likeness]

    def _choose(self, jobs: Sequence[Job]) -> Choice:
        first = jobs[0]
        body = getattr(first.model, "body", first.model)
        choice = Choice(type(body).__name__, first.batch_size, type(first.optimizer).__name__, 1, "")
        reason = unfit(first.model)
        if reason is not None:
            return replace(choice, reason=reason)
        if self._clients != "auto":
            return replace(choice, clients=self._clients, reason="as configured")
        most = max(min(len(jobs), fitting(first) // self._workers), 1)
        if most == 1:
            return replace(choice, reason="there is memory for one only, or there is one only")
        clients, seconds = self._fastest(jobs, most)
        named = {str(count): round(value, 6) for count, value in seconds.items()}
        return replace(choice, clients=clients, reason="fastest of those tried", seconds=named)

    def _fastest(self, jobs: Sequence[Job], most: int) -> tuple[int, dict[int, float]]:
        """Stacks are tried from the smallest to where they no longer gain, each against what the workers do at once.

        Small ones may lose where larger ones gain: their parts' cost is the same, and fewer share it.
        """
        even = math.ceil(len(jobs) / self._workers)
        seconds: dict[int, float] = {}
        best, least = 1, math.inf
        for count in sorted({1, 4, 16, 64, 256, even}):
            if count > most or count * seconds.get(1, 0) * TRIED_STEPS > LONGEST_TRIAL:
                break
            seconds[count] = timed(jobs[:count])
            stacks = math.ceil(len(jobs) / count)
            whole = math.ceil(stacks / self._workers) * math.ceil(len(jobs) / stacks) * seconds[count]
            if whole <= WORTH * least:
                best, least = count, whole
            elif count >= 4 * max(best, 4):
                break
        return best, seconds


def timed(jobs: Sequence[Job]) -> float:
    """Seconds that a client's step takes when copies of these jobs train as one; a single one trains alone."""
    device = jobs[0].samples.labels.device
    best, spent, trials = math.inf, 0.0, 0
    while spent < TRIED_SECONDS or (trials < 2 and spent < 1):  # more than once: the first one warms up
        trials += 1
        copies = [_copy(job) for job in jobs]
        steps = sum(job.steps for job in copies)
        started = _now(device)
        if len(copies) == 1:
            train_alone(copies[0])
        else:
            train_together(copies)
        seconds = max(_now(device) - started, 1e-6)
        best, spent = min(best, seconds / steps), spent + seconds
    return best


def train_alone(job: Job) -> Fitted:
    """What `fit` does when nobody waits for it."""
    return fit(
        job.model,
        job.samples,
        job.optimizer,
        epochs=job.epochs,
        batch_size=job.batch_size,
        rng=job.rng,
        objective=job.objective,
        after_backward=job.after_backward,
        after_step=job.after_step,
        after_epoch=job.after_epoch,
        min_steps=job.min_steps,
        schedule=job.schedule,
    )


def fitting(job: Job) -> int:
    """How many clients have room in memory at once, by what a step of one of them keeps for its backward pass."""
    job = _copy(job)
    at = slice(0, min(job.batch_size + 1, len(job.samples)))
    kept: dict[int, int] = {}

    def weigh(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    job.model.train()
    with saved_tensors_hooks(weigh, lambda tensor: tensor):
        F.cross_entropy(job.model(to_pixels(job.samples.images[at])), job.samples.labels[at])
    weights = sum(tensor.numel() * tensor.element_size() for tensor in job.model.parameters())
    samples = job.samples.images.numel() * job.samples.images.element_size()
    # Gradients of activations come beside them; weights have gradients, two of Adam's states, and a copy.
    return int(MEMORY_SHARE * _free(job.samples.labels.device) / (2 * sum(kept.values()) + 5 * weights + samples))


def _copy(job: Job) -> Job:
    """The same job on things of its own, a few steps of it."""
    model = deepcopy(job.model)
    optimizer = again(job.optimizer, list(model.parameters()))
    rng = Generator()
    rng.set_state(job.rng.get_state())
    return replace(
        job, model=model, optimizer=optimizer, rng=rng, epochs=0, min_steps=min(job.steps, TRIED_STEPS), schedule=None
    )


def _now(device: torch.device) -> float:
    """Seconds of work: of this thread on a CPU, where other processes may run as well; of the clock on a GPU."""
    if device.type == "cpu":
        return time.thread_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _free(device: torch.device) -> int:
    """Bytes of free memory where the device computes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not told on this system: a modest guess
        return 4 * 2**30
