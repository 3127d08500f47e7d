"""From a configuration to objects, checked one by one and together."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fl_sim.composing import CHOICES, GROUPS, LISTS, Config, choices, compose_config, read
from fl_sim.errors import ConfigError, require
from fl_sim.protocols import Follower
from fl_sim.randomness import generator
from fl_sim.schema import META, Settings, construct, locate
from fl_sim.trackers.following import Guarded
from fl_sim.world import Parts, World, digest, fingerprint, pick_device, populate

CALLS = {
    "data": "load",
    "partition": "split",
    "model": "body",
    "client": "update",
    "attack": "update",
    "collusion": "tamper",
    "trigger": "__call__",
    "threat": "malicious",
    "sampler": "cohort",
    "aggregator": "aggregate",
    "server_optimizer": "step",
    "eraser": "erase",
    "erasing": "due",
    "detection": "screen",
    "faults": "draw",
    "tracker": "log",
    "engine": "run",
}
"""What each group's component is asked to do: one that lacks it is found before any work."""
ABSENT = ("attack", "collusion", "eraser", "detection", "faults", "tracker")
"""Groups in which a choice without a `_target_` means that there is no such component."""
LATER: dict[str, Any] = {"faults": {}, "quorum": 1, "below_quorum": "skip", "repeats": 3, "timeout": None}
"""Keys that were added with the value that changes nothing: with it, a run is still the run that it was before them."""
IN_PASSING = (
    *("name", "output", "choices", "rounds", "init", "device", "engine", "timeout", "tracker", "checkpoint", "eval"),
    *("detection", "central", "erasers", "baselines", "detectors"),
)
"""Keys that a run may go on with another value of."""


def build(config: Config) -> Parts:
    """Build every component, checking types, values and combinations; loads no data and writes nothing."""
    rest = {key: value for key, value in config.items() if key not in (*GROUPS, CHOICES)}
    settings: Settings = construct(Settings, rest, {CHOICES: config[CHOICES]})
    built: dict[str, Any] = {}
    require("experiment" not in config, "experiment", config.get("experiment"), "has no keys of its own")
    for group in GROUPS:
        if group == "experiment":
            continue
        if group == "tracker":
            _check_tracker(config)
            continue
        given = {"client": built["client"]} if group == "attack" else None
        # A run folder of an earlier version may lack a group that is there now: then it had no such component.
        built[group] = component(group, config.get(group, {} if group in ABSENT else None), given)
    if hasattr(built["attack"], "adopt"):
        _ask("trigger", built["trigger"], "check", built["data"].facts.shape)  # while it is still there to be asked
        built["trigger"] = built["attack"].adopt(built["trigger"])
    for key, group in LISTS.items():
        named = {name: _named(key, group, name, section) for name, section in getattr(settings, key).items()}
        built[key] = {name: part for name, part in named.items() if part is not None}
    parts = Parts(settings=settings, **built)
    _check_together(parts)
    return parts


def _check_tracker(config: Config) -> None:
    """Try the tracker's values, unless it might open files as soon as it is built: the run folder is not there yet."""
    section = config.get("tracker", {})
    target = section.get("_target_") if isinstance(section, Mapping) else None
    try:
        lazy = target is None or hasattr(locate(target), "rebuild")
    except ConfigError as error:
        raise error.within("tracker") from error
    if lazy:
        component("tracker", section, {"folder": Path(str(config["output"])), "config": config})


def _named(key: str, group: str, name: str, section: Any) -> Any:
    """One of a list of a group's choices; its complaints name the list."""
    try:
        return component(group, section)
    except ConfigError as error:
        raise ConfigError(f"{key}.{name}{error.key.removeprefix(group)}", error.value, error.allowed) from error


def component(group: str, section: Any, given: Mapping[str, Any] | None = None) -> Any:
    """One component from its section of the configuration."""
    require(isinstance(section, Mapping), group, section, "must be a section with a _target_")
    if "_target_" not in section:
        extra = [key for key in section if key not in META]
        require(group in ABSENT, f"{group}._target_", None, "is missing")
        require(not extra, f"{group}.{extra[0] if extra else ''}", None, "unknown key: this choice takes none")
        return None
    try:
        found = locate(section["_target_"])
        # Before it is called: a configuration may be somebody else's.
        able = inspect.isclass(found) and callable(getattr(found, CALLS[group], None))
        require(able, "_target_", section["_target_"], f"is no {group}: no class that has {CALLS[group]}()")
        built = construct(found, section, given)
    except ConfigError as error:
        raise error.within(group) from error
    return built


def _check_together(parts: Parts) -> None:
    """What no component can know alone: sizes against images, counts against counts."""
    facts, settings = parts.data.facts, parts.settings
    held_out = round(parts.data.clean_fraction * facts.train_samples)
    pool = facts.train_samples - held_out
    malicious = len(parts.threat.malicious(settings.clients, generator(0)))
    rate = parts.server_optimizer.rate
    for group, call, arguments in (
        ("backdoor", "check", (facts.classes,)),
        ("trigger", "check", (facts.shape,)),
        ("model", "check", (facts.shape,)),
        ("partition", "check", (pool, settings.clients)),
        ("attack", "check_server", (rate,)),
        ("sampler", "check_cohort", (settings.clients_per_round, malicious, settings.clients)),
        ("aggregator", "check_cohort", (settings.clients_per_round,)),
    ):
        part = settings.backdoor if group == "backdoor" else getattr(parts, group)
        _ask(group, part, call, *arguments)
    if hasattr(parts.attack, "check_goal"):
        _ask("backdoor", parts.attack, "check_goal", settings.backdoor, facts.classes)
    allowed = f"{settings.clients} clients share only {pool} samples of {facts.train_samples}"
    require(pool >= settings.clients, "clients", settings.clients, allowed)
    erasers = {f"eraser={settings.choices['eraser']}": parts.eraser}
    for key in ("erasers", "baselines"):
        erasers |= {f"{name} of {key}": each for name, each in getattr(parts, key).items()}
    hungry = [name for name, each in erasers.items() if each is not None and getattr(each, "needs_clean", True)]
    detectors = [parts.detection, *parts.detectors.values()]
    for what, needs in (
        (hungry[0] if hungry else "", bool(hungry)),
        ("the detector", any(each is not None and getattr(each, "needs_clean", True) for each in detectors)),
        ("the aggregator", getattr(parts.aggregator, "needs_clean", False)),
        ("the erasing policy", getattr(parts.erasing, "watches_clean_set", False)),
    ):
        least = 2 * facts.classes
        allowed = f"{what} needs a clean set: at least {least} of {facts.train_samples} samples, 2 a class"
        require(not needs or held_out >= least, "data.clean_fraction", parts.data.clean_fraction, allowed)


def _ask(group: str, part: Any, call: str, *arguments: Any) -> None:
    """Ask a component that can be asked; what it complains of is named within its group."""
    if hasattr(part, call):
        try:
            getattr(part, call)(*arguments)
        except ConfigError as error:
            raise error.within(group) from error


def to_text(config: Config) -> str:
    """A configuration as one line of JSON, in its own order: Flower's run config takes only scalars."""
    return json.dumps(config)


def config_text(run_config: Mapping[str, object]) -> str:
    """The composed configuration that Flower's run config carries: as it stands, or as the overrides that make it."""
    return str(run_config["config"]) or _composed_text(str(run_config.get("overrides", "")))


@lru_cache(maxsize=1)
def _composed_text(overrides: str) -> str:
    return to_text(compose_config(shlex.split(overrides)))


def config_hash(config: Config) -> str:
    """Names a run by what decides its numbers: everything but its name and where it is put."""
    decisive = {key: value for key, value in config.items() if key not in ("name", "output", CHOICES)}
    decisive = {key: value for key, value in decisive.items() if key not in LATER or value != LATER[key]}
    if config.get("init"):
        decisive["init"] = fingerprint(str(config["init"]))
    return digest(decisive)


def plan_hash(config: Config) -> str:
    """Names what a checkpoint belongs to: all that decides what comes of a round.

    Not how many rounds there are, nor what computes, scores and tells of them: that may change before a run goes on.
    """
    decisive = {key: value for key, value in config.items() if key not in IN_PASSING}
    return digest(decisive)


@lru_cache(maxsize=1)
def world_of(text: str) -> World:
    """The world of a configuration, built once in a process: all its clients and its server share the data."""
    config = json.loads(text)
    parts = build(config)
    try:
        return populate(parts, pick_device(parts.settings.device))
    except ConfigError as error:
        # Loading names the keys of the data section; the others are said as they stand.
        raise error if error.key.split(".")[0] in ("device", "init", "partition") else error.within("data") from error


@lru_cache(maxsize=1)
def trackers_of(text: str, folder: Path) -> Sequence[Follower]:
    """The trackers that a configuration asks for beyond `metrics.jsonl`, which every run writes.

    The same ones whoever asks: the rounds, the baselines beside them and the run's end are told of in one place.
    """
    config = json.loads(text)
    tracker = component("tracker", config.get("tracker", {}), {"folder": folder, "config": config})
    return [] if tracker is None else [Guarded(tracker, str(config[CHOICES].get("tracker")))]


# What there is --------------------------------------------------------------------------------------------------------


def describe(group: str, folders: Sequence[Path]) -> list[tuple[str, str, str, str]]:
    """(name, sentence, paper, fidelity) of each choice of a group."""
    rows = []
    for name, path in choices(group, folders).items():
        try:
            section = read(path)
        except ConfigError as error:
            rows.append((name, f"({error.allowed})", "", ""))  # one bad file must not hide the others
            continue
        if "_target_" in section:
            try:
                sentence = (locate(section["_target_"]).__doc__ or "").strip().split("\n\n")[0]
                sentence += f" {_cost(section)}" if group == "model" else ""
            except ConfigError as error:
                sentence = f"({error})"  # one choice that can't be imported must not hide the others
        else:
            # Hydra wants a preset's package on its first line; what it is stands in the comment after it.
            words = [line.strip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
            sentence = next((line for line in words if not line.startswith("@package")), "")
        rows.append((name, " ".join(sentence.split()), section.get("paper", ""), section.get("fidelity", "")))
    return rows


def _cost(section: Mapping[str, Any]) -> str:
    """What a network of ten classes costs on colour images of 32×32, in words."""
    from fl_sim.models.cost import cost

    model = component("model", section)
    try:
        parameters, products = cost(model)
    except Exception as error:  # as above: whatever is wrong with one network, the others are shown
        return f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'cannot be built'})"
    return f"{parameters / 1e6:.3g}M parameters, {products / 1e9:.2g} GMAC at 32×32."
