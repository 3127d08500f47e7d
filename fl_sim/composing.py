"""From overrides to a configuration: what Hydra composes, with every complaint in a line that names the key."""

from __future__ import annotations

import importlib.resources
import os
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
from fl_sim.schema import META, unknown

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
LISTS = {"erasers": "eraser", "baselines": "eraser", "detectors": "detection"}
"""Plain keys that hold names of a group's choices, each composed on its own."""
SWEEPING = ("hydra/launcher", "hydra/sweeper", "hydra.launcher.", "hydra.sweeper.")
"""Hydra's settings of sweeps, which `sweep_plan` reads: they are no part of a run's configuration."""
MOST = 100_000
"""Runs of a sweep; more are a slip."""
LONGEST = 255
"""Characters of a key; Hydra asks for files of that name."""
CHOICES = "choices"
"""The section that records which choice of each group a configuration was composed from."""


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
    content, chosen = _chosen([each for each in overrides if each not in values], folders, state)
    config = _with_values(content, values)
    if config is None:
        content, chosen = _by_hydra(tuple(str(each.input_line) for each in overrides), state)
        config = OmegaConf.create(content)
    return config, chosen


def _chosen(
    overrides: Sequence[Override], folders: Sequence[Path], state: tuple[Any, ...]
) -> tuple[Config, Mapping[str, str]]:
    """What Hydra composes from choices alone.

    A file that is nothing but its group's section takes the place of the default's, in a seventh of Hydra's time.
    """
    sections: dict[str, Config | None] = {}
    for override in overrides:  # of a group that is chosen twice the last one counts, as with Hydra
        group, plain = str(override.key_or_group), override.type is OverrideType.CHANGE and override.package is None
        path = choices(group, folders).get(str(override.value())) if plain and group in GROUPS else None
        sections[group] = None if path is None or len(folders) > 1 else _section(path, state)
        if sections[group] is None:
            return _by_hydra(tuple(str(each.input_line) for each in overrides), state)
    content, chosen = _by_hydra((), state)
    return content | sections, {**chosen, **{str(each.key_or_group): str(each.value()) for each in overrides}}


@lru_cache(maxsize=1024)
def _section(path: Path, state: tuple[Any, ...]) -> Config | None:
    """What a choice puts into its group's section, with its interpolations; None if it says more than that."""
    content = read(path)
    more = "defaults" in content or "@package" in path.read_text(encoding="utf-8")
    return None if more else content


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
