"""The nouns: what each kind of component is asked, and what it is told.

A defense's context holds what a real server knows. It never holds the trigger, the test set or who is malicious, so
a threshold chosen by test ASR can't be written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor, nn

from fl_sim.augment import Augment
from fl_sim.layout import Layout
from fl_sim.samples import Samples
from fl_sim.training import Fitted, Hook, Objective, Schedule

if TYPE_CHECKING:
    from fl_sim.backdoor import Backdoor, Goal
    from fl_sim.models.classifier import Classifier

State: TypeAlias = Mapping[str, Tensor | float | int | str | bool]
"""What a component remembers: flat, plain values, so that a checkpoint needs no pickle."""

Indices: TypeAlias = npt.NDArray[np.int64]


class Fit(Protocol):
    """The one training loop, `fl_sim.training.fit`."""

    def __call__(
        self,
        model: nn.Module,
        samples: Samples,
        optimizer: torch.optim.Optimizer,
        *,
        epochs: int,
        batch_size: int,
        rng: Generator,
        objective: Objective = ...,
        after_backward: Iterable[Hook] = ...,
        after_step: Iterable[Hook] = ...,
        after_epoch: Iterable[Hook] = ...,
        min_steps: int = ...,
        schedule: Schedule | None = ...,
    ) -> Fitted: ...


@dataclass(frozen=True)
class Workshop:
    """What an attacker makes its trigger and its poisoned images with: its own things, and the model it received."""

    model: Classifier
    """The received global model: a copy of the attacker's own, in evaluation mode; train a deep copy of it."""
    goal: Goal
    classes: int
    rng: Generator
    rank: int
    """This client's place among all malicious clients, from 0: distributed attacks give each its part."""
    attackers: int
    """How many malicious clients there are in all."""
    record: State = field(default_factory=dict)
    """What the attackers' trigger had learned before; empty at first."""


class Trigger(Protocol):
    """Pixels in [0, 1] -> stamped pixels, batched, on their device: what the scorer stamps on test images.

    Must not draw at random: the same images give the same stamped images. May have `check(shape)`, a `rule` that
    its paper prefers (used where `backdoor.rule` is auto), and the abilities below. One whose abilities never look at
    the workshop's model says `uses_model = False`: centrally that spares training one.
    """

    def __call__(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class Crafting(Protocol):
    """A trigger whose poisoned training images differ from what is stamped in the end."""

    def craft(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        """Pixels and their true classes -> poisoned pixels."""
        ...


@runtime_checkable
class Covering(Protocol):
    """A trigger that comes with cover samples: changed images that keep their labels, to sharpen it or to hide it."""

    @property
    def cover(self) -> float:
        """Cover samples for each poisoned one."""
        ...

    def disguise(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor: ...


@runtime_checkable
class Learned(Protocol):
    """A trigger that is trained, on the attacker's own data only."""

    def learn(self, samples: Samples, workshop: Workshop) -> State:
        """The record of what was learned; the round's record is that of its lowest malicious client."""
        ...

    def recall(self, record: State) -> Trigger:
        """The trigger that a record stands for."""
        ...


@runtime_checkable
class Selecting(Protocol):
    """A natural trigger: only some images carry it."""

    def selects(self, x: Tensor) -> Tensor:
        """Which of the images [N] carry it."""
        ...


@dataclass(frozen=True)
class ServerPlan:
    """What an adaptive attacker has found out about the server's erasing."""

    eraser: Eraser | None
    erasing: ErasingPolicy
    rounds: int
    noticed: Mapping[int, bool] = field(default_factory=dict)
    """Rounds of which the attackers have seen whether an erasing came before."""

    def erased_before(self, round_: int) -> bool:
        """Whether the model received in this round comes straight from an erasing.

        Where the policy can't be foretold: what was noticed, and in any other round it may.
        """
        if self.eraser is None or round_ <= 1:
            return False
        if isinstance(self.erasing, Watching):
            return self.noticed.get(round_, True)
        return self.erasing.due(round_ - 1, self.rounds)


@dataclass(frozen=True)
class Threatening:
    """What an attacker knows beyond a benign client: the common goal and the colluders in this round."""

    backdoor: Backdoor
    rank: int
    """This client's place among all malicious clients, from 0: distributed attacks give each its part."""
    attackers: int
    """How many malicious clients there are in all."""
    weight: float
    """The share of the cohort's aggregation weight that this round's attackers hold together."""
    server_rate: float | None
    """The server's learning rate η, or None where its step is not proportional to the aggregate."""
    previous: Tensor | None = None
    """The global vector of the last round in which one of the attackers attacked; None at first."""
    record: State = field(default_factory=dict)
    """What the attackers' learned trigger has come to; `backdoor` recalls it already."""
    plan: ServerPlan | None = None


@dataclass(frozen=True)
class ClientContext:
    """What a client is told when it is asked for an update."""

    round: int
    client: int
    rng: Generator
    classes: int
    layout: Layout
    received: Tensor
    """The global model's vector, which the given model holds already."""
    augment: Augment
    fit: Fit
    private: State = field(default_factory=dict)
    """What this client remembered in an earlier round."""
    threatening: Threatening | None = None

    def delta(self, model: nn.Module) -> Tensor:
        """A fresh vector: how far the model has moved from the one received."""
        return self.layout.read(model).sub_(self.received)

    def workshop(self, model: Classifier) -> Workshop:
        """An attacker's workshop around a copy of the model, which must still hold the received weights."""
        assert self.threatening is not None
        known = self.threatening
        own = deepcopy(model).eval().requires_grad_(False)
        return Workshop(own, known.backdoor.goal, self.classes, self.rng, known.rank, known.attackers, known.record)


@dataclass(frozen=True)
class Update:
    """A client's answer: how it wants the global model changed."""

    delta: Tensor
    samples: int
    loss: float
    private: State | None = None
    """What to remember instead; None keeps what was remembered."""
    record: State | None = None
    """What this attacker's trigger has learned: for the other attackers and the scorer only."""
    accuracy: float | None = None
    """The trained model's on samples of this client that it never trains on, if it holds any out."""


class Client(Protocol):
    """Benign or malicious: trains `model`, which holds the global weights, in place and says what changed."""

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update: ...


class Attack(Client, Protocol):
    """A malicious client. Built around the benign client of the run, whose training it uses.

    One that brings a trigger of its own has `adopt(trigger)`: from the configured trigger to the one in use.
    """

    client: Client


class Collusion(Protocol):
    """What omniscient attackers do who see all updates of a round before the server does."""

    def tamper(self, deltas: Tensor, malicious: Tensor, ctx: ServerContext) -> Tensor:
        """Parameter deltas [K, P] with the rows of `malicious` [K] replaced, as a fresh tensor."""
        ...


@dataclass(frozen=True)
class ServerContext:
    """What a server really knows in a round."""

    round: int
    rng: Generator
    device: torch.device
    classes: int
    clients: tuple[int, ...]
    """The ids behind the rows of the stacked updates, in order."""
    assumed_attackers: int
    """How many of them the server supposes to be malicious."""
    layout: Layout
    vector: Tensor
    """The global model before this step."""
    clean: Samples | None
    """The held-out clean set."""
    augment: Augment
    new_model: Callable[[], Classifier]
    """A model of the run's architecture with fresh weights."""
    fit: Fit


@dataclass(frozen=True)
class Aggregate:
    """A rule's result: the step for the parameters, which rows it kept (None: all), what it remembers."""

    delta: Tensor
    kept: Tensor | None = None
    state: State = field(default_factory=dict)


class Aggregator(Protocol):
    """A rule over stacked parameter deltas [K, P] and weights [K] that sum to one; the deltas must not be changed."""

    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate: ...


class ServerOptimizer(Protocol):
    """Turns an aggregate into a step of the global parameters."""

    @property
    def rate(self) -> float | None:
        """η, if a step is η times the aggregate to begin with; else None."""
        ...

    def step(self, delta: Tensor, state: State) -> tuple[Tensor, State]: ...


class Eraser(Protocol):
    """Removes a backdoor from a model; never changes its input, keeps the layout; may set `needs_clean = False`."""

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]: ...


@dataclass(frozen=True)
class Screen:
    """What a detector has prepared to tell the inputs of one model apart."""

    score: Callable[[Tensor], Tensor]
    """Pixels [N, C, H, W] -> a number for each [N]: the higher, the more the image looks stamped.

    An image's number must not depend on the others in its batch: a served model sees one at a time.
    """
    state: State = field(default_factory=dict)
    """What to remember for the next model of the run."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """What the record should say of the preparation."""


class Detector(Protocol):
    """Tells stamped inputs from clean ones by what a server has; never changes the model; may set `needs_clean`.

    The clean set is the context's; which threshold would raise an alarm is not asked, AUROC judges all of them.
    """

    def screen(self, model: Classifier, state: State, ctx: ServerContext) -> Screen: ...


class ErasingPolicy(Protocol):
    """When the server erases, and when it refuses the result; may be `Watching`, too.

    An erased model is refused if its accuracy on the clean set is below `floor` times what it was.
    """

    @property
    def floor(self) -> float: ...

    def due(self, round_: int, rounds: int) -> bool:
        """Whether the calendar says so."""
        ...


@dataclass(frozen=True)
class Signals:
    """What a server has seen of its own run; one entry for each round, the newest last."""

    rejected: tuple[float, ...] = ()
    """The share of the updates that the aggregation rule rejected."""
    steps: tuple[float, ...] = ()
    """The length of the global parameters' step."""
    accuracies: tuple[float, ...] = ()
    """On the clean set, after the step; empty without a clean set."""
    losses: tuple[float, ...] = ()
    rounds_since_erasing: int = 0
    """This round included; since the first round if there was no erasing yet."""
    elapsed_seconds: float = 0.0
    """Since the run's first round, what was done before an interruption included."""
    erasing_seconds: tuple[float, ...] = ()
    """Of each erasing so far, refused ones too."""


@dataclass(frozen=True)
class Decision:
    """Whether to erase now, and why: the record's words."""

    erase: bool
    reason: str


@runtime_checkable
class Watching(Protocol):
    """A policy that can't be foretold, because it decides by what the server sees; its calendar may be empty."""

    @property
    def watches_clean_set(self) -> bool:
        """Whether it needs accuracies and losses on the clean set, whose measuring costs something in each round."""
        ...

    def decide(self, signals: Signals) -> Decision: ...


class Sampler(Protocol):
    """Who takes part in a round, and with what weight."""

    def cohort(self, clients: int, size: int, malicious: frozenset[int], rng: Generator) -> list[int]: ...

    def weights(self, samples: Sequence[int]) -> list[float]: ...


class Threat(Protocol):
    """Which clients are malicious, and in which rounds they attack."""

    def malicious(self, clients: int, rng: Generator) -> frozenset[int]: ...

    def active(self, round_: int) -> bool: ...


Garbled: TypeAlias = Literal[
    "not_a_number",
    "infinite",
    "too_long",
    "wrong_shape",
    "wrong_dtype",
    "wrong_name",
    "wrong_client",
    "stale",
    "duplicate",
    "malformed",
    "empty",
]
"""Kinds of answers that no server can use."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one client's answer to one order."""

    kind: Literal["crash", "silent"] | Garbled | None = None
    seconds: float | None = None
    """When its reply arrives on a simulated clock; None without one. Nobody sleeps."""


class Faults(Protocol):
    """Misbehaviour that is no attack: by whom and when is drawn for each client and round."""

    @property
    def deadline(self) -> float | None:
        """Seconds after which the server stops waiting, on the simulated clock."""
        ...

    @property
    def comes_later(self) -> bool:
        """Whether a reply that was too late still arrives, in the next round."""
        ...

    def draw(self, rng: Generator) -> Fault: ...


class Partition(Protocol):
    """Splits sample indices over clients by their labels; each sample is used once."""

    def split(self, labels: Indices, clients: int, rng: np.random.Generator) -> list[Indices]: ...


class Tracker(Protocol):
    """Writes results; the round loop has no other way to say anything."""

    def log(self, event: str, **fields: object) -> None: ...


@runtime_checkable
class Follower(Tracker, Protocol):
    """A tracker that copies `metrics.jsonl`: after an interruption it holds what it would hold without one."""

    def rebuild(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Begin, and take in what the record holds already in place of all that was logged in earlier attempts.

        Called once, before any `log`; only then are files opened.
        """
        ...

    def end(self, summary: Mapping[str, Any]) -> None:
        """The run has finished, with this summary."""
        ...

    def close(self) -> None:
        """Let go of everything, however the run has ended."""
        ...
