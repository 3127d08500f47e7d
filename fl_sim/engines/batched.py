"""Clients of a round trained together: `inprocess`, whose clients meet in `fit`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from flwr.app import Message
from flwr.clientapp import ClientApp

from fl_sim.engines.inprocess import InProcess, InProcessGrid
from fl_sim.errors import FolderError, require
from fl_sim.folder import read_json, write_json
from fl_sim.together.choice import Choices
from fl_sim.together.meeting import Meeting
from fl_sim.together.training import Job, train_together
from fl_sim.training import Fitted

AT_ONCE = 256
"""Clients with a thread, and a model, of their own; a larger cohort comes in several waves."""
CHOICES = "batched"
"""The entry of `meta.json` that says how each kind of training is done."""


class BatchedGrid(InProcessGrid):
    """Runs the ClientApps of a round side by side and trains those that are alike as one network.

    However many threads there are, `workers` of them compute at once, one torch thread each.
    """

    def __init__(
        self, app: ClientApp, nodes: int, run_config: Mapping[str, str], workers: int, choices: Choices
    ) -> None:
        super().__init__(app, nodes, run_config, AT_ONCE)
        self._choices = choices
        self._slots = workers
        self._trainers = ThreadPoolExecutor(workers, "trainer", initializer=torch.set_num_threads, initargs=(1,))
        self._batched: set[int] = set()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies in the messages' order."""
        named = [self._named(message) for message in messages]
        waves = [named[at : at + AT_ONCE] for at in range(0, len(named), AT_ONCE)]
        self._batched = set()
        return [reply for number, wave in enumerate(waves) for reply in self._replies_of(wave, number * AT_ONCE)]

    def close(self) -> None:
        super().close()
        self._trainers.shutdown(wait=True, cancel_futures=True)

    def facts(self) -> dict[str, int]:
        """How many clients of the last round trained together with others."""
        return {"batched": len(self._batched)}

    def _replies_of(self, wave: Sequence[Message], first: int) -> list[Message]:
        visits = {place: partial(self._deliver, message) for place, message in enumerate(wave, start=first)}
        meeting = Meeting(visits, self._slots, self._pool, self._trainers, lambda job: self._choices.is_alone(job.kind))
        return meeting.lead(self._plan, self._train)

    def _plan(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Stacks of alike jobs, those of alike length together, as even in size as can be."""
        kinds: dict[Hashable, list[int]] = defaultdict(list)
        for at, job in enumerate(jobs):
            if (kind := job.kind) is not None:
                kinds[kind].append(at)
        stacks = []
        for kind, members in kinds.items():
            if len(members) > 1 and (most := self._choices.clients_of(kind, [jobs[at] for at in members])) > 1:
                members.sort(key=lambda at: jobs[at].size)
                count = -(-len(members) // most)
                bounds = [len(members) * number // count for number in range(count + 1)]
                stacks += [members[left:right] for left, right in pairwise(bounds)]
        return [stack for stack in stacks if len(stack) > 1]

    def _train(self, jobs: Sequence[Job]) -> Sequence[Fitted | None]:
        """Train a stack; one that has no room is halved, and one that fails is left to its members.

        Only the client at fault then fails, with its own error.
        """
        if len(jobs) == 1:
            return [None]
        drawn = [job.rng.get_state() for job in jobs]
        try:
            fitted = train_together(jobs)
        except Exception as error:
            for job, state in zip(jobs, drawn, strict=True):
                job.rng.set_state(state)
            if "memory" not in f"{type(error).__name__} {error}".lower():
                return [None] * len(jobs)
            del error
        else:
            self._batched.update(job.place for job in jobs)
            return fitted
        if jobs[0].samples.labels.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(jobs) // 2
        return [*self._train(jobs[:half]), *self._train(jobs[half:])]


@dataclass(frozen=True)
class Batched(InProcess):
    """Trains clients of a round together, as one network of stacked tensors, where that pays.

    `clients` is how many at most; `auto` measures it when a kind of training first turns up, 1 included, and
    writes it to `meta.json`. What can't be stacked trains alone. The number changes results in their last bits;
    `workers`, at a given number, does not.
    """

    capture: bool = field(default=False, init=False)  # every client has a model of its own, hardly worth a graph
    clients: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        usable = self.clients == "auto" or 1 <= self.clients <= AT_ONCE
        require(usable, "clients", self.clients, f"must be auto or from 1 to {AT_ONCE} clients at once")

    def grid(self, app: ClientApp, nodes: int, run_config: Mapping[str, str], workers: int) -> InProcessGrid:
        meta = Path(run_config["folder"]) / "meta.json"
        known = read_json(meta).get(CHOICES, {}) if meta.exists() else {}
        try:
            choices = Choices(self.clients, workers, known, _noting(meta))
        except (TypeError, ValueError, AttributeError) as error:
            raise FolderError(f"can't read {meta}: its entry {CHOICES!r} is damaged") from error
        return BatchedGrid(app, nodes, run_config, workers, choices)


def _noting(meta: Path) -> Callable[[dict[str, Any]], None]:
    """Writes choices to `meta.json`, from where a resumed run takes them."""
    return partial(_note, meta)


def _note(meta: Path, choices: dict[str, Any]) -> None:
    write_json(meta, (read_json(meta) if meta.exists() else {}) | {CHOICES: choices})
