"""The typed schema: a component's own signature says which keys it takes, of which types."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fl_sim.backdoor import Goal
from fl_sim.errors import ConfigError, require

META = ("paper", "fidelity")
"""Keys of a choice's yaml that describe it and are not handed to it."""


@dataclass(frozen=True)
class Seeds:
    """What each kind of draw is keyed by; all default to `seed`, so that paired comparisons are possible."""

    data: int
    threat: int
    train: int


@dataclass(frozen=True)
class Schedule:
    """Something done after every `every`-th round, and after the last."""

    every: int = 1

    def __post_init__(self) -> None:
        require(self.every >= 1, "every", self.every, "must be 1 or more rounds")

    def due(self, round_: int, rounds: int) -> bool:
        return round_ % self.every == 0 or round_ == rounds


@dataclass(frozen=True)
class Evaluation(Schedule):
    """When the global model is scored, and whether each class is scored by itself, too."""

    per_class: bool = False


@dataclass(frozen=True)
class Track:
    """How closely `fl-sim central` watches ACC and ASR while it trains; what it reports at the end is always exact."""

    every: int | None = 1
    """Epochs from one score to the next; None: only the victim's last epoch is scored."""
    images: int | None = None
    """How many test images, always the same ones, such a score uses; None, or more than there are: all."""

    def __post_init__(self) -> None:
        every, images = self.every, self.images
        require(every is None or every >= 1, "every", every, "must be null or 1 or more epochs")
        require(images is None or images >= 1, "images", images, "must be null, which means all, or 1 or more")


@dataclass(frozen=True)
class Central:
    """How a centralized victim is trained: in place of the client's own numbers, on the pooled, poisoned data."""

    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine"] = "cosine"
    augment: bool = True
    poison_rate: float = 0.1
    clean_label_rate: float | None = None
    """In place of `poison_rate` for clean-label attacks, of the target class's images; None: the same number."""
    mode: Literal["dataset", "per_batch"] = "dataset"
    track: Track = field(default_factory=Track)

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", self.epochs, "must be 1 or more")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "must be 2 or more")
        require(self.lr > 0, "lr", self.lr, "must be above 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "must be from 0 to below 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")
        require(0 <= self.poison_rate <= 1, "poison_rate", self.poison_rate, "must be a fraction from 0 to 1")
        rate = self.clean_label_rate
        require(rate is None or 0 <= rate <= 1, "clean_label_rate", rate, "must be null or a fraction from 0 to 1")

    def against(self, rule: str) -> Central:
        """The plan for a backdoor's rule: one rate of poison remains."""
        if rule != "clean_label" or self.clean_label_rate is None:
            return replace(self, clean_label_rate=None)
        return replace(self, poison_rate=self.clean_label_rate, clean_label_rate=None)


@dataclass(frozen=True)
class Settings:
    """The keys that belong to no group."""

    seed: int
    seeds: Seeds
    name: str
    output: str
    rounds: int
    clients: int
    clients_per_round: int
    device: str
    assumed_attackers: float
    choices: dict[str, Any]
    """Which choice of each group the configuration was composed from."""
    quorum: int | float = 1
    """Updates that a round needs: a whole number, or a share of those who are asked."""
    below_quorum: Literal["skip", "repeat"] = "skip"
    repeats: int = 3
    """How often a round is tried again before it is skipped."""
    timeout: float | None = None
    """Seconds after which the server stops waiting for replies, on the wall's clock."""
    init: str | None = None
    backdoor: Goal = field(default_factory=Goal)
    eval: Evaluation = field(default_factory=Evaluation)
    checkpoint: Schedule = field(default_factory=Schedule)
    central: Central = field(default_factory=Central)
    erasers: dict[str, Any] = field(default_factory=dict)
    """Those that `fl-sim central` tries, by name, each composed on its own."""
    baselines: dict[str, Any] = field(default_factory=dict)
    """Those that are tried centrally beside a federated run."""
    detectors: dict[str, Any] = field(default_factory=dict)
    """Detectors that `fl-sim central` tries, by name, each composed on its own."""

    def __post_init__(self) -> None:
        plain = self.name and all(char.isalnum() or char in "-_.=+," for char in self.name) and self.name[0] != "."
        require(bool(plain) and len(self.name) <= 80, "name", self.name, "must be 1 to 80 letters, digits, - _ . = + ,")
        require(bool(self.output), "output", self.output, "must be a folder")
        require(1 <= self.rounds <= 1_000_000, "rounds", self.rounds, "must be a whole number from 1 to 1000000")
        require(1 <= self.clients <= 10_000_000, "clients", self.clients, "must be a whole number from 1 to 10000000")
        fits = 1 <= self.clients_per_round <= self.clients
        allowed = f"must be from 1 to the number of clients, {self.clients}"
        require(fits, "clients_per_round", self.clients_per_round, allowed)
        most = self.clients_per_round
        whole = isinstance(self.quorum, int)
        allowed = f"must be 1 to {most} updates, or a share of the cohort: above 0, at most 1.0"
        require(1 <= self.quorum <= most if whole else 0 < self.quorum <= 1, "quorum", self.quorum, allowed)
        require(1 <= self.repeats <= 1000, "repeats", self.repeats, "must be a whole number from 1 to 1000")
        positive = self.timeout is None or self.timeout > 0
        require(positive, "timeout", self.timeout, "must be null, which means none, or seconds above 0")
        fraction = 0 <= self.assumed_attackers < 1
        require(fraction, "assumed_attackers", self.assumed_attackers, "must be a fraction from 0 to below 1")


def locate(target: str) -> Callable[..., Any]:
    """The class or function that a dotted path names."""
    require(isinstance(target, str), "_target_", target, "must be the dotted path of a class")
    module, _, name = target.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's module does on import
        usual = isinstance(error, ImportError | AttributeError | ValueError)
        reason = " ".join(f"{'' if usual else f'{type(error).__name__}: '}{error}".split())
        raise ConfigError("_target_", target, f"can't be imported ({reason})") from error
    require(callable(found), "_target_", target, "is neither a class nor a function")
    return found


def construct(target: Callable[..., Any], values: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Any:
    """Call a component's class with checked values; `given` are objects that the caller supplies.

    Every complaint is a `ConfigError` that names the key within this component.
    """
    given = dict(given or {})
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) and not is_dataclass(target) else target)
        parameters = inspect.signature(target).parameters
    except (NameError, TypeError, ValueError) as error:
        name = getattr(target, "__name__", str(target))
        raise ConfigError("_target_", name, f"its parameters can't be read ({error})") from error
    accepted = [name for name in parameters if name not in given]
    arguments: dict[str, Any] = {name: value for name, value in given.items() if name in parameters}
    for name, value in values.items():
        if name in META or name == "_target_":
            continue
        if name not in accepted:
            raise ConfigError(name, value, unknown(name, accepted))
        arguments[name] = convert(name, value, hints.get(name, Any))
    for name in accepted:
        if name not in arguments and parameters[name].default is inspect.Parameter.empty:
            raise ConfigError(name, None, "is missing")
    return target(**arguments)


def unknown(name: str, accepted: Sequence[str]) -> str:
    """What to say of a key that does not exist."""
    close = get_close_matches(name, accepted, n=1)
    if close:
        return f"unknown key; did you mean {close[0]}?"
    return f"unknown key; there are {', '.join(accepted)}" if accepted else "unknown key; there are none here"


def convert(key: str, value: Any, hint: Any) -> Any:
    """The value as the annotated type, or a `ConfigError`; nothing is guessed that could hide a mistake."""
    kind = get_origin(hint) or hint
    if kind in (Union, types.UnionType):
        return _convert_union(key, value, get_args(hint))
    if kind is Literal:
        choices = get_args(hint)
        require(value in choices, key, value, f"must be {_alternatives(hint)}")
        return value
    if kind is bool:
        require(isinstance(value, bool), key, value, "must be true or false")
        return value
    if kind is int:
        require(isinstance(value, int) and not isinstance(value, bool), key, value, "must be a whole number")
        return value
    if kind is float:
        # Not math.isfinite, which fails on a whole number that is too large for a float.
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        require(number, key, value, "must be a number")
        return float(value)
    if kind is str:
        require(isinstance(value, (str, int, float)) and not isinstance(value, bool), key, value, "must be text")
        return str(value)
    if kind in (tuple, list, Sequence):
        require(isinstance(value, list), key, value, "must be a list, such as [1,2]")
        return tuple(convert(key, item, get_args(hint)[0]) for item in value)
    if kind in (Mapping, dict):
        require(isinstance(value, Mapping), key, value, "must be a section, such as {key: value}")
        return value
    if isinstance(value, Mapping) and ("_target_" in value or is_dataclass(kind)):
        target = locate(value["_target_"]) if "_target_" in value else kind
        try:
            return construct(target, value)
        except ConfigError as error:
            raise error.within(key) from error
    require(not is_dataclass(kind), key, value, "must be a section with keys of its own")
    return value


def _convert_union(key: str, value: Any, alternatives: Sequence[Any]) -> Any:
    if value is None and type(None) in alternatives:
        return None
    for alternative in alternatives:
        if alternative is type(None):
            continue
        try:
            return convert(key, value, alternative)
        except ConfigError:
            continue
    raise ConfigError(key, value, f"must be {' or '.join(_alternatives(each) for each in alternatives)}")


def _alternatives(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) in (Mapping, dict):
        return "a section such as {key: value}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
