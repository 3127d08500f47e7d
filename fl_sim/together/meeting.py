"""Where the clients of a round meet: each on a thread of its own, all in `fit` at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeAlias, TypeVar

from torch import Generator, nn
from torch.optim import Optimizer

from fl_sim.errors import RunError
from fl_sim.interruption import undisturbed
from fl_sim.protocols import Fit
from fl_sim.samples import Samples
from fl_sim.together.choice import train_alone
from fl_sim.together.training import Job
from fl_sim.training import Fitted, Hook, Objective, Schedule, cross_entropy, fit

T = TypeVar("T")
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


class Meeting(Generic[T]):
    """Clients at work, of whom no more than there are slots compute at once.

    Whoever calls `fit` waits until all others have called it as well or are done, unless it is to train alone anyway;
    so who trains with whom never depends on who came first. A slot goes from hand to hand: whoever stops computing
    starts the next one, and nobody else wakes up for that.
    """

    def __init__(
        self,
        visits: Mapping[int, Callable[[], T]],
        slots: int,
        clients: Executor,
        trainers: Executor,
        alone: Callable[[Job], bool],
    ) -> None:
        self._visits, self._clients, self._trainers, self._alone = visits, clients, trainers, alone
        self._done: dict[int, Future[T]] = {place: Future() for place in visits}
        self._lock = threading.Lock()
        self._free = slots
        self._ready: deque[Callable[[], object]] = deque()
        """What goes on as soon as a slot is free."""
        self._working = len(visits)
        self._waiting: list[_Waiting] = []
        self._calls: list[threading.Event] = []
        """Of all who ever waited."""
        self._ended: SimpleQueue[BaseException | None] = SimpleQueue()
        """What whoever leads waits for: that all have left, or a fault."""
        self._over = False

    def lead(self, plan: Plan, train: Train) -> list[T]:
        """Until all have left: have those who wait trained, together as `plan` says, and let them go on.

        What each visit gave. An interruption comes while nothing is held, or waits.
        """
        if not self._visits:
            return []
        self._plan, self._train = plan, train
        try:
            with undisturbed():
                self._let_go([partial(self._clients.submit, self._attend, place) for place in self._visits])
            fault = self._ended.get()
            if fault is not None:
                raise fault
        except BaseException:
            with undisturbed():
                self._end()
            raise
        return [done.result() for done in self._done.values()]

    def _attend(self, place: int) -> None:
        """A client's whole stay; `client_fit()` is this meeting's inside."""
        token = _stand_in.set(self._fit_of(place))
        try:
            self._done[place].set_result(self._visits[place]())
        except BaseException as error:
            self._done[place].set_exception(error)
        finally:
            _stand_in.reset(token)
            self._stop(None)

    def _stop(self, mine: _Waiting | None) -> None:
        """A client waits, or has left; the last one at work sees to it that those who wait go on."""
        with self._lock:
            if mine is not None:
                if self._over:
                    raise Interrupted("the run was interrupted")
                self._calls.append(mine.called)
                self._waiting.append(mine)
            self._working -= 1
            last, anyone = not self._working, bool(self._waiting)
        if last and anyone:
            self._begin(partial(self._trainers.submit, self._go_on))
        elif last:
            self._ended.put(None)
        self._pass_on()

    def _go_on(self) -> None:
        """All wait who have not left."""
        try:
            with self._lock:
                waiting, self._waiting = sorted(self._waiting, key=lambda each: each.job.place), []
                self._working += len(waiting)
            stacks = self._plan([each.job for each in waiting])
            alone = sorted({*range(len(waiting))}.difference(*stacks))
            self._let_go([waiting[at].called.set for at in alone])
            together = ([waiting[at] for at in stack] for stack in stacks)
            self._let_go([partial(self._trainers.submit, self._train_stack, stack) for stack in together])
        except BaseException as error:  # it is for whoever leads to raise
            self._ended.put(error)

    def _train_stack(self, stack: Sequence[_Waiting]) -> None:
        try:
            for each, fitted in zip(stack, self._train([each.job for each in stack]), strict=True):
                each.fitted = fitted
            self._let_go([each.called.set for each in stack])
        except BaseException as error:
            self._ended.put(error)
        finally:
            self._pass_on()

    def _let_go(self, all_: Iterable[Callable[[], object]]) -> None:
        """Have each go on, when it is its turn."""
        with self._lock:
            if self._over:
                return
            self._ready.extend(all_)
            now = [self._ready.popleft() for _ in range(min(self._free, len(self._ready)))]
            self._free -= len(now)
        for go in now:
            self._begin(go)

    def _pass_on(self) -> None:
        """Give one's slot to the next."""
        with self._lock:
            if not self._ready:
                self._free += 1
                return
            go = self._ready.popleft()
        self._begin(go)

    def _begin(self, go: Callable[[], object]) -> None:
        try:
            go()
        except RuntimeError as error:
            self._ended.put(RunError(f"no thread for another client of the round ({error}): fewer clients_per_round"))

    def _end(self) -> None:
        """Let everyone go who is or will be in `fit`, with an error."""
        with self._lock:
            self._over = True
            self._ready.clear()
            for call in self._calls:
                call.set()

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
        if self._alone(job) and not self._over:
            return train_alone(job)
        mine = _Waiting(job)
        self._stop(mine)
        mine.called.wait()
        if self._over:
            raise Interrupted("the run was interrupted")
        return train_alone(job) if mine.fitted is None else mine.fitted
