"""From overrides to a checked configuration, and from a configuration to objects."""

from __future__ import annotations

import importlib.resources
import inspect
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fl_sim.errors import ConfigError, require
from fl_sim.folder import conf_folder as conf_folder
from fl_sim.protocols import Follower
from fl_sim.randomness import generator
from fl_sim.schema import META, Settings, construct, locate, unknown
from fl_sim.trackers.following import Guarded
from fl_sim.world import Parts, World, digest, fingerprint, pick_device, populate

Config: TypeAlias = dict[str, Any]
"""A composed and resolved configuration, plain values only."""

GROUPS = (
    "data",
    "partition",
    "model",
    "client",
    "attack",
    "collusion",
    "trigger",
    "threat",
    "sampler",
    "aggregator",
    "server_optimizer",
    "eraser",
    "erasing",
    "detection",
    "faults",
    "tracker",
    "engine",
    "experiment",
)
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
LISTS = {"erasers": "eraser", "baselines": "eraser", "detectors": "detection"}
"""Plain keys that hold names of a group's choices, each composed on its own."""
SWEEPING = ("hydra/launcher", "hydra/sweeper", "hydra.launcher.", "hydra.sweeper.")
"""Hydra's settings of sweeps, which `sweep_plan` reads: they are no part of a run's configuration."""
LATER: dict[str, Any] = {"faults": {}, "quorum": 1, "below_quorum": "skip", "repeats": 3, "timeout": None}
"""Keys that were added with the value that changes nothing: with it, a run is still the run that it was before them."""
IN_PASSING = (
    *("name", "output", "choices", "rounds", "init", "device", "engine", "timeout", "tracker", "checkpoint", "eval"),
    *("detection", "central", "erasers", "baselines", "detectors"),
)
"""Keys that a run may go on with another value of."""
MOST = 100_000
"""Runs of a sweep; more are a slip."""
LONGEST = 255
"""Characters of a key; Hydra asks for files of that name."""
CHOICES = "choices"
"""The section that records which choice of each group a configuration was composed from."""


# From overrides to a configuration ------------------------------------------------------------------------------------


def quoted(text: str) -> str:
    """A text as an override's value, whatever letters it has."""
    return QuotedString(text, Quote.double).with_quotes()


def parse(overrides: Sequence[str]) -> list[Override]:
    """Hydra's reading of command-line overrides."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except (HydraException, ValueError, RecursionError) as error:  # a number too long for int(), brackets too deep
            key, _, value = text.partition("=")
            raise ConfigError(key, value, f"can't be read; overrides look like {key or 'rounds'}=VALUE") from error
        key = str(parsed[-1].key_or_group)
        require(len(key) <= LONGEST, f"{key[:57]}...", _text(parsed[-1]), f"no key has more than {LONGEST} characters")
    return parsed


def jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The runs of a sweep: the product of all comma lists, ranges and choices."""
    parsed, number = parse(overrides), 1
    for override in parsed:
        try:
            number *= _count(override) if override.is_sweep_override() else 1
        except (HydraException, ValueError, ArithmeticError) as error:
            allowed = "is no list of values: intervals are for a search (hydra/sweeper=optuna), glob is not supported"
            if not isinstance(error, HydraException):
                allowed = "is no list of values: a range takes finite numbers and a step that is not 0"
            raise ConfigError(override.key_or_group, _text(override), allowed) from error
        require(number <= MOST, "-m", " ".join(overrides), f"asks for more than {MOST:,} runs at once")
    [batch] = BasicSweeper.split_arguments(parsed, None)
    require(bool(batch), "-m", " ".join(overrides), "gives no run: one of the keys has no values")
    return [list(job) for job in batch]


def _count(override: Override) -> int:
    """How many values an override gives a sweep, if no more than a sweep may have: else any larger number."""
    value = override.value()
    if isinstance(value, RangeSweep) and value.start is not None and value.stop is not None:
        length, step = abs(value.stop - value.start), abs(value.step)
        if 0 < step * (MOST + 1) < length:  # Hydra would write out a shuffled range before its first value
            return MOST + 1
    return sum(1 for _ in islice(override.sweep_iterator(), MOST + 1))


def search_folders(overrides: Sequence[Override]) -> list[Path]:
    """Where choices come from: fl-sim's own folder and those that `hydra.searchpath` adds."""
    folders = [conf_folder()]
    for override in overrides:
        if override.key_or_group == "hydra.searchpath" and isinstance(entries := override.value(), list):
            folders += [_folder(str(entry)) for entry in entries]
    return folders


def _folder(entry: str) -> Path:
    if entry.startswith("pkg://"):
        try:
            path = Path(str(importlib.resources.files(entry.removeprefix("pkg://"))))
        except (ImportError, ValueError) as error:
            raise ConfigError("hydra.searchpath", entry, f"no such package ({error})") from error
    else:
        path = Path(entry.removeprefix("file://"))
    require(path.is_dir(), "hydra.searchpath", entry, "no such folder")
    return path


def choices(group: str, folders: Sequence[Path]) -> dict[str, Path]:
    """The choices of a group by name. An editor's lock is none: its name begins with a dot, and it links to nothing."""
    paths = (path for folder in folders for path in (folder / group).glob("*.yaml"))
    found = {path.stem: path for path in paths if not path.name.startswith(".") and path.is_file()}
    return dict(sorted(found.items()))


def read(path: Path) -> Config:
    """What a choice's file says; what can't be read is a `ConfigError` that names the file."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise ConfigError(path.parent.name, path.stem, f"can't read {path}: {_reason(error)}") from error
    require(isinstance(content, dict), path.parent.name, path.stem, f"{path} must hold keys with values")
    return dict(content)


def _reason(error: Exception) -> str:
    """Why a file can't be read, in a line: YAML's own reasons take several, with the place at the end."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def compose_config(overrides: Sequence[str]) -> Config:
    """Compose and resolve; unknown choices and keys are a `ConfigError`. Types and values are `check`'s business."""
    parsed = parse(overrides)
    folders = search_folders(parsed)
    for override in parsed:
        check_choice(override, folders)
    try:
        unresolved, chosen = _composed(parsed, folders)
        config: Any = OmegaConf.to_container(unresolved, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        _blame(error, parsed, folders)
        raise _explained(error, parsed) from error
    except RecursionError as error:
        longest = max(parsed, key=lambda override: len(str(override.input_line)))
        raise ConfigError(longest.key_or_group, _text(longest), "is nested too deep") from error
    require(CHOICES not in config, CHOICES, config.get(CHOICES), "records what was chosen; it can't be set")
    config[CHOICES] = {group: chosen.get(group) for group in GROUPS}
    _drop_stale(config, parsed, folders)
    for key, group in LISTS.items():
        config[key] = _sections(group, key, config[key], parsed)
    return dict(config)


def _blame(error: Exception, overrides: Sequence[Override], folders: Sequence[Path]) -> None:
    """Complain of a user's file that can't be read, if that is what Hydra's error came of."""
    of_a_file = isinstance(error, (yaml.YAMLError, UnicodeError, OSError))
    named = {(each.key_or_group, str(each.value())) for each in overrides if each.key_or_group in GROUPS}
    paths = [path for group in GROUPS for path in choices(group, folders[1:]).values()]
    for path in sorted(paths, key=lambda path: (path.parent.name, path.stem) not in named):
        if of_a_file or (path.parent.name, path.stem) in named:
            read(path)


def _composed(overrides: Sequence[Override], folders: Sequence[Path]) -> tuple[DictConfig, Mapping[str, str]]:
    """Hydra's composition, unresolved, and its choices.

    What the choices make is kept, because runs of a sweep mostly differ in values alone, which take a hundredth of the
    time to set. What Hydra would complain of goes to Hydra.
    """
    values = [override for override in overrides if _is_value(override, folders)]
    state = _state(folders)
    content, chosen = _by_hydra(tuple(str(each.input_line) for each in overrides if each not in values), state)
    config = _with_values(content, values)
    if config is None:
        content, chosen = _by_hydra(tuple(str(each.input_line) for each in overrides), state)
        config = OmegaConf.create(content)
    return config, chosen


def _with_values(content: Config, overrides: Sequence[Override]) -> DictConfig | None:
    """A composition with other values; None where one of them has no place in it."""
    config = OmegaConf.create(content)
    OmegaConf.set_struct(config, True)
    try:
        for override in overrides:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    except OmegaConfBaseException:
        return None
    return config


def _is_value(override: Override, folders: Sequence[Path]) -> bool:
    """Whether an override only gives a key that is there another value, and decides of no choice."""
    key = str(override.key_or_group)
    plain = override.type is OverrideType.CHANGE and override.package is None and not override.is_sweep_override()
    return plain and not key.startswith("hydra") and not any(os.path.isdir(folder / key) for folder in folders)


def _state(folders: Sequence[Path]) -> tuple[Any, ...]:
    """What changes when one of the files does that a configuration is composed from."""
    files = sorted(path for folder in folders for path in folder.rglob("*.yaml") if path.exists())
    return tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files)


@lru_cache(maxsize=256)
def _by_hydra(overrides: tuple[str, ...], state: tuple[Any, ...]) -> tuple[Config, Mapping[str, str]]:
    """What Hydra composes, as plain values with their interpolations, and its choices."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        composed = compose("config", overrides=list(overrides), return_hydra_config=True)
    content: Any = OmegaConf.to_container(composed, resolve=False)
    del content["hydra"]
    return content, dict(composed.hydra.runtime.choices)


def _drop_stale(config: Config, overrides: Sequence[Override], folders: Sequence[Path]) -> None:
    """Take out what a preset says of a choice that the overrides have replaced, where the new choice has no such key.

    `experiment=... attack=none` is the preset's control: what it says of its attack must not stand in the way.
    """
    said = {override.key_or_group for override in overrides}
    preset = choices("experiment", folders).get(str(config[CHOICES]["experiment"]))
    own = read(preset) if preset is not None else {}
    for group in said & set(GROUPS) & set(own):
        known = read(choices(group, folders)[str(config[CHOICES][group])])
        for key in own[group]:
            if key not in known and f"{group}.{key}" not in said:
                del config[group][key]


def _sections(group: str, key: str, names: Any, overrides: Sequence[Override]) -> Config:
    """The named choices of a group, or `all` of them but `none`, each composed on its own: {name: section}."""
    found = choices(group, search_folders(overrides))
    every = [name for name in found if name != "none"]
    names = every if names == "all" else names
    allowed = f"must be all or a list of names as of {group}=, such as [{','.join(every[:2])}]"
    require(isinstance(names, list), key, names, allowed)
    for name in names:
        require(str(name) in found, key, name, f"no such {group} (there are {', '.join(found)})")
    return {str(name): read(found[str(name)]) for name in names}


def each_choice(group: str, overrides: Sequence[str]) -> list[Config]:
    """A configuration for every choice of a group, or for the one that the overrides name.

    An override of one of the group's own keys goes to those choices that have this key.
    """
    parsed = parse(overrides)
    if any(override.key_or_group == group for override in parsed):
        return [compose_config(overrides)]
    own = {
        str(o.input_line): o.key_or_group.partition(".")[2] for o in parsed if o.key_or_group.startswith(f"{group}.")
    }
    keys = {name: set(read(path)) for name, path in choices(group, search_folders(parsed)).items()}
    if any(not any(key in known for known in keys.values()) for key in own.values()):
        return [compose_config(overrides)]  # which says what is wrong with it
    return [
        compose_config([*(text for text in overrides if own.get(text) in (None, *known)), f"{group}={name}"])
        for name, known in keys.items()
    ]


def check_choice(override: Override, folders: Sequence[Path]) -> None:
    """Complain of an override that chooses what is not there, or touches what is not the user's."""
    group = override.key_or_group
    if group.startswith(SWEEPING):
        raise ConfigError(group, _text(override), "is for sweeps: add -m")
    if group.startswith("hydra.") and group != "hydra.searchpath":
        raise ConfigError(group, _text(override), "fl-sim uses nothing of Hydra's own settings but hydra.searchpath")
    if group not in GROUPS:
        require(not override.is_delete(), f"~{group}", "", "can't be left out; give it another value instead")
        return
    value, names = override.value(), list(choices(group, folders))
    require(not override.is_delete(), f"~{group}", "", f"can't be left out; choose one of {', '.join(names)}")
    require(not override.is_sweep_override(), group, _text(override), "several values need -m, which makes a sweep")
    require(not isinstance(value, list), group, value, f"takes one choice; one of {', '.join(names)}")
    if value not in names:
        close = get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(group, value, f"no such choice{hint} (there are {', '.join(names)})")


def _explained(error: Exception, overrides: Sequence[Override]) -> ConfigError:
    """Hydra's complaint as one line that names the key."""
    for override in overrides:
        if override.is_sweep_override():
            return ConfigError(override.key_or_group, _text(override), "several values need -m, which makes a sweep")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not overrides:
        return ConfigError("configuration", "", reason)
    for override in overrides:
        key = override.key_or_group
        if reason.startswith(f"Could not override '{key}'") or f"'{key}'" in reason:
            return ConfigError(key, override.value(), _unknown_key(key, overrides))
    guilty = overrides[-1]
    return ConfigError(guilty.key_or_group, _text(guilty), reason)


def _text(override: Override) -> str:
    """An override's value as it was typed."""
    return str(override.input_line).partition("=")[2]


def _unknown_key(key: str, overrides: Sequence[Override]) -> str:
    """What to say of a key that the configuration lacks: its siblings under the same choices."""
    chosen = [str(o.input_line) for o in overrides if o.key_or_group in GROUPS or o.key_or_group == "hydra.searchpath"]
    section: Any = compose_config(chosen)
    *path, last = key.split(".")
    for part in path:
        section = section.get(part, {}) if isinstance(section, dict) else {}
    known = [name for name in section if name not in (*META, CHOICES, "_target_")] if isinstance(section, dict) else []
    return unknown(last, known) if known else "unknown key; there are none here"


# From a configuration to objects --------------------------------------------------------------------------------------


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
            words = [line.strip("# ") for line in path.read_text().splitlines() if line.startswith("#")]
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
