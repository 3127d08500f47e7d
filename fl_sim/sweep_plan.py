"""What the command of a sweep asks for: its runs or its search, who chooses them and what executes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fl_sim import composing
from fl_sim.errors import ConfigError, require
from fl_sim.launchers import LAUNCHER, Launcher
from fl_sim.schema import construct, locate
from fl_sim.search import SWEEPER, Choices, Dimension, Numbers, Search

SAMPLER = "hydra/sweeper/sampler"
SECTIONS = {"launcher": LAUNCHER, "sweeper": SWEEPER}
REPEATED = ("seed", "seeds.data", "seeds.threat", "seeds.train")
"""Several values of these are not searched for the luckiest one: each trial is repeated with all of them."""


@dataclass(frozen=True)
class Product:
    """Every combination of the values: Hydra's basic sweeper."""

    params: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """A sweep as it was asked for."""

    overrides: list[str]
    """What the runs are made of: the command's own overrides, and a preset's values where the command has none."""
    launcher: Launcher
    search: Search | None
    """Who chooses the next runs by the results of earlier ones; None: every combination is run."""


@dataclass(frozen=True)
class Space:
    """The overrides of a search: what all its trials share, what is searched, what each trial is repeated with."""

    fixed: list[str]
    searched: dict[str, Dimension] = field(default_factory=dict)
    repeats: list[list[str]] = field(default_factory=lambda: [[]])


def plan(overrides: Sequence[str]) -> Plan:
    """The plan of a sweep's command; whatever is wrong with it is a `ConfigError`."""
    parsed = composing.parse(overrides)
    ours = [each for each in parsed if _concerns_sweeping(each.key_or_group)]
    runs = [each for each in parsed if each not in ours]
    sections = _sections(parsed, ours)
    for override in ours:
        _set(sections, override)
    launcher = _constructed("launcher", sections["launcher"])
    sweeper = _constructed("sweeper", sections["sweeper"])
    words = [str(each.input_line) for each in runs]
    said = {each.key_or_group for each in runs}
    words += [f"{key}={value}" for key, value in (sweeper.params or {}).items() if key not in said]
    require(hasattr(launcher, "launch"), LAUNCHER, type(launcher).__name__, "is no launcher: it has no launch()")
    return Plan(words, launcher, sweeper if isinstance(sweeper, Search) else None)


def space(overrides: Sequence[str]) -> Space:
    """The overrides of a search, sorted; Hydra's `interval`, `range`, `choice`, comma lists and `tag(log, ...)`."""
    fixed, searched, repeated = [], dict[str, Dimension](), []
    for override in composing.parse(overrides):
        key = override.get_key_element()
        if not override.is_sweep_override():
            fixed.append(str(override.input_line))
        elif override.key_or_group in REPEATED:
            repeated.append(str(override.input_line))
        else:
            searched[key] = _dimension(key, override)
    require(bool(searched), SWEEPER, "optuna", "has nothing to search: give a key an interval or several values")
    return Space(fixed, searched, composing.jobs(repeated) if repeated else [[]])


def _dimension(key: str, override: Override) -> Dimension:
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        low, high = value.start or 0, value.end or 0
        require(low < high, key, _typed(override), "is empty")
        positive = "log" not in value.tags or low > 0
        require(positive, key, _typed(override), "what is searched by its logarithm begins above 0")
        whole = isinstance(low, int) and isinstance(high, int)
        return Numbers(float(low), float(high), None, whole=whole, log="log" in value.tags)
    if isinstance(value, RangeSweep) and not value.shuffle:
        numbers = list(value.range())
        require(bool(numbers), key, _typed(override), "gives no value")
        whole = all(isinstance(each, int) for each in numbers)
        if whole or len(numbers) == 1:
            log = "log" in value.tags
            return Numbers(float(numbers[0]), float(numbers[-1]), None if log else float(value.step), whole, log)
    require(not isinstance(value, Glob), key, _typed(override), "can't be searched")
    return Choices(tuple(override.sweep_string_iterator()))


def _concerns_sweeping(key: str) -> bool:
    return key in (*SECTIONS.values(), SAMPLER) or key.startswith(("hydra.launcher.", "hydra.sweeper."))


def _sections(parsed: Sequence[Override], ours: Sequence[Override]) -> dict[str, dict[str, Any]]:
    """Launcher and sweeper as conf/sweep.yaml and the user's own folders have them, and the values of a preset."""
    folders = composing.search_folders(parsed)
    searched = [str(each.input_line) for each in parsed if each.key_or_group == "hydra.searchpath"]
    chosen, presets = list(searched), list(searched)
    for override in parsed:
        key, text = override.key_or_group, str(override.input_line)
        if key.startswith("hydra.") and override not in ours:
            composing.check_choice(override, folders)
        if key in SECTIONS.values():
            group = key.removeprefix("hydra/")
            _check_choice(key, override.value(), list(composing.choices(group, folders)))
            chosen.append(text.removeprefix("hydra/"))
        elif key == "experiment" and override.is_sweep_override():
            _check_presets(override, composing.choices(key, folders))
        elif key == "experiment":
            composing.check_choice(override, folders)
            presets.append(text)
    try:
        with initialize_config_dir(str(composing.conf_folder()), version_base="1.3"):
            found: Any = OmegaConf.to_container(compose("sweep", overrides=chosen), resolve=True)
            params = compose("config", overrides=presets, return_hydra_config=True).hydra.sweeper.get("params")
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        culprit = ours[-1] if ours else parsed[-1]
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(culprit.key_or_group, _typed(culprit), reason) from error
    found["sweeper"]["params"] = {**(found["sweeper"].get("params") or {}), **(params or {})}
    return dict(found)


def _check_choice(key: str, value: object, names: Sequence[str]) -> None:
    if value not in names:
        close = get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(key, value, f"no such choice{hint} (there are {', '.join(names)})")


def _check_presets(override: Override, presets: Mapping[str, Any]) -> None:
    """Several presets are several bases of a sweep; one that brings a sweep of its own can't be one of several."""
    for name in override.sweep_string_iterator():
        if name in presets and "hydra" in OmegaConf.load(presets[name]):
            raise ConfigError("experiment", name, "is a sweep of its own, which can't be one value of another")


def _set(sections: dict[str, dict[str, Any]], override: Override) -> None:
    """Put one override into its section; what it may be is for the section's class to say."""
    key = override.key_or_group
    if key in SECTIONS.values():
        return
    require(not override.is_sweep_override(), key, _typed(override), "takes one value")
    if key == SAMPLER:
        key = "hydra.sweeper.sampler.name"
    _, name, *path = key.split(".")
    section: Any = sections[name]
    for part in path[:-1]:
        section = section.setdefault(part, {})
        require(isinstance(section, dict), key, _typed(override), f"{part} has no keys of its own")
    section[path[-1]] = override.value()


def _constructed(name: str, section: dict[str, Any]) -> Any:
    target = section.get("_target_")
    require(isinstance(target, str), f"hydra.{name}._target_", target, "is missing")
    try:
        return construct(locate(str(target)), section)
    except ConfigError as error:
        raise error.within(f"hydra.{name}") from error


def _typed(override: Override) -> str:
    """An override's value as it was typed."""
    return str(override.input_line).partition("=")[2]
