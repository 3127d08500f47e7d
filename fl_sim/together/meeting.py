"""Where the clients of a round meet: each on a thread of its own, all in `fit` at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Generator, nn
from torch.optim import Optimizer

from fl_sim.protocols import Fit
from fl_sim.samples import Samples
from fl_sim.together.choice import train_alone
from fl_sim.together.training import Job
from fl_sim.training import Fitted, Hook, Objective, Schedule, cross_entropy, fit

Plan: TypeAlias = Callable[[Sequence[Job]], Sequence[Sequence[int]]]
"""Jobs in the clients' order -> positions of those that train together; all others train alone."""
Train: TypeAlias = Callable[[Sequence[Job]], Sequence[Fitted | None]]
"""Jobs that train together -> what became of each; None: it must train alone after all."""

_stand_in: ContextVar[Fit] = ContextVar("stand_in")


def client_fit() -> Fit:
    """What a client trains with: `fit`, or what stands in for it on this thread."""
    return _stand_in.get(fit)


def stand_in(fit: Fit) -> None:
    """From now on, clients on this thread train with this."""
    _stand_in.set(fit)


class Interrupted(RuntimeError):
    """The run ended while a client was waiting for the others."""


@dataclass
class _Waiting:
    job: Job
    called: threading.Event = field(default_factory=threading.Event)
    fitted: Fitted | None = None
    """What a training with others gave; None: train alone."""


class Meeting:
    """Clients at work, of whom no more than there are slots compute at once.

    Whoever calls `fit` waits until all others have called it as well or are done; so who trains with whom never
    depends on who came first.
    """

    def __init__(self, members: int, slots: threading.Semaphore) -> None:
        self._slots = slots
        self._change = threading.Condition()
        self._working = members
        self._waiting: list[_Waiting] = []
        self._over = False

    @contextmanager
    def attended(self, place: int) -> Iterator[None]:
        """A client's whole stay; `client_fit()` is this meeting's inside."""
        token = _stand_in.set(self._fit_of(place))
        try:
            with self._slots:
                yield
        finally:
            _stand_in.reset(token)
            with self._change:
                self._left_or_waits()

    def lead(self, plan: Plan, train: Train, pool: Executor) -> None:
        """Until all have left: have those who wait trained, together as `plan` says, and let them go on."""
        waiting: list[_Waiting] = []
        try:
            while waiting := self._gathered():
                jobs = [each.job for each in waiting]
                stacks = pool.submit(plan, jobs).result()
                with self._change:
                    self._working += len(waiting)
                for alone in {*range(len(jobs))}.difference(*stacks):
                    waiting[alone].called.set()
                trained = [pool.submit(self._in_slot, train, [jobs[at] for at in stack]) for stack in stacks]
                for stack, future in zip(stacks, trained, strict=True):
                    for at, fitted in zip(stack, future.result(), strict=True):
                        waiting[at].fitted = fitted
                        waiting[at].called.set()
        except BaseException:
            self._end([*waiting])
            raise

    def _in_slot(self, train: Train, jobs: Sequence[Job]) -> Sequence[Fitted | None]:
        with self._slots:
            return train(jobs)

    def _end(self, waiting: Sequence[_Waiting]) -> None:
        """Let everyone go who is or will be in `fit`, with an error."""
        with self._change:
            self._over = True
            for each in [*self._waiting, *waiting]:
                each.called.set()

    def _gathered(self) -> list[_Waiting]:
        """All that wait, once nobody works; none when all have left."""
        with self._change:
            self._change.wait_for(lambda: not self._working)
            waiting, self._waiting = sorted(self._waiting, key=lambda each: each.job.place), []
            return waiting

    def _left_or_waits(self) -> None:
        """One fewer is at work; whoever leads is woken for the last one only, as waking takes the interpreter away."""
        self._working -= 1
        if not self._working:
            self._change.notify_all()

    def _fit_of(self, place: int) -> Fit:
        def fit_together(
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
            hooks = tuple(after_backward), tuple(after_step), tuple(after_epoch)
            job = Job(place, model, samples, optimizer, epochs, batch_size, rng, objective, *hooks, min_steps, schedule)
            return self._trained(job)

        return fit_together

    def _trained(self, job: Job) -> Fitted:
        mine = _Waiting(job)
        with self._change:
            if self._over:
                raise Interrupted("the run was interrupted")
            self._waiting.append(mine)
            self._left_or_waits()
        self._slots.release()
        try:
            mine.called.wait()
        finally:
            self._slots.acquire()
        if self._over:
            raise Interrupted("the run was interrupted")
        return train_alone(job) if mine.fitted is None else mine.fitted
