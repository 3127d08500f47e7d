"""Groups: the same configuration under several seeds; settings: the same attack on the same task, whatever defends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from fl_sim.report.cases import BESIDE, FEDERATED, NONE, Case

Keys: TypeAlias = Mapping[str, str]
DEFENSE = ("aggregator", "eraser", "erasing")
"""The sections that are the defense; all others are the setting that it is tried in."""
PLAIN = {"aggregator": "mean", "eraser": NONE}
"""What stands where nothing defends."""
NO_DEFENSE = "no defense"
ABSENT = "–"
FIRST = ("kind", "experiment", "data", "partition", "model", "client", "attack", "collusion", "trigger", "threat")
TITLE = ("data", "model", "attack", "trigger")


@dataclass(frozen=True)
class Group:
    """One configuration; its cases differ in nothing but their seeds."""

    kind: str
    keys: Keys
    cases: Sequence[Case]
    repeats: Sequence[Case]
    """Cases of a seed that is there already: the same numbers once more, which must not count twice."""
    varied: Keys
    """What tells it from the others."""
    setting: str
    defense: str

    @property
    def label(self) -> str:
        return f"{self.setting}: {self.defense}"

    @property
    def attacked(self) -> bool:
        """Whether anybody attacks; a centralized victim is always poisoned."""
        return self.kind != FEDERATED or any(self.keys.get(key, NONE) != NONE for key in ("attack", "collusion"))

    def by_seed(self) -> dict[tuple[object, ...], Case]:
        return {case.seeds: case for case in self.cases}


@dataclass(frozen=True)
class Grouped:
    """All groups, and the keys in which they differ with each one's values, in order."""

    groups: Sequence[Group]
    varied: Mapping[str, Sequence[str]]
    common: Keys


def section(key: str) -> str:
    return key.split(".")[0]


def grouped(cases: Iterable[Case]) -> Grouped:
    """Cases by configuration."""
    bins: dict[tuple[str, frozenset[tuple[str, str]]], list[Case]] = {}
    for case in cases:
        bins.setdefault((case.kind, frozenset(case.keys.items())), []).append(case)
    named = [({"kind": kind} | dict(found[0].keys), found) for (kind, _), found in bins.items()]
    all_keys = [keys for keys, _ in named]
    varied = varying(all_keys)
    told = [{key: keys[key] for key in differing(keys, varied)} for keys in all_keys]
    labels = labelling([key for key in varied if section(key) not in DEFENSE], told)
    groups = []
    for (keys, found), own in zip(named, told, strict=True):
        kept, repeats = _once_a_seed(found)
        setting = ", ".join(_said(key, own[key]) for key in labels if key in own)
        setting = setting or " · ".join(keys[key] for key in TITLE if key in keys)
        groups.append(Group(keys["kind"], keys, kept, repeats, own, setting, defense(keys, own)))
    groups.sort(key=_order)
    values = {key: sorted({own.get(key, ABSENT) for own in told}, key=natural) for key in varied}
    common = {k: v for k, v in all_keys[0].items() if all(keys.get(k) == v for keys in all_keys)} if all_keys else {}
    return Grouped(groups, values, common)


def varying(all_keys: Sequence[Keys]) -> dict[str, set[str | None]]:
    """The keys that differ, the most telling first, each with the choices of its section within which it does.

    A choice's own keys differ only where runs of the same choice differ in them: that `krum` has other keys than `mean`
    is said by their names. For the same reason a kind of run that never has a key does not differ in it.
    """
    seen: dict[str, dict[str | None, set[str]]] = {}
    having: dict[str, set[str]] = {}
    for keys in all_keys:
        for key in keys:
            having.setdefault(key, set()).add(keys["kind"])
    for key, kinds in having.items():
        values = seen.setdefault(key, {})
        for keys in all_keys:
            idle = section(key) == "erasing" and keys.get("eraser", NONE) == NONE
            if keys["kind"] in kinds and not idle:
                values.setdefault(_within(key, keys), set()).add(keys.get(key, ABSENT))
    found = {key: {choice for choice, each in values.items() if len(each) > 1} for key, values in seen.items()}
    order = sorted(found, key=lambda key: (FIRST.index(key) if key in FIRST else len(FIRST), "." in key))
    return {key: found[key] for key in order if found[key]}


def _within(key: str, keys: Keys) -> str | None:
    """The choice that a key belongs to; None for a choice itself, and for keys of no choice."""
    return None if section(key) == key else keys.get(section(key))


def differing(keys: Keys, varied: Mapping[str, set[str | None]]) -> list[str]:
    """Those of the varied keys that tell this configuration from another."""
    return [key for key, choices in varied.items() if key in keys and _within(key, keys) in choices]


def labelling(keys: Sequence[str], all_keys: Sequence[Keys]) -> list[str]:
    """As many of the keys as it takes to tell the settings apart: one that another implies is left out of the name."""
    whole = len({tuple(each.get(key) for key in keys) for each in all_keys})
    taken: list[str] = []
    classes = 1
    for key in keys:
        if classes == whole:
            break
        split = len({tuple(each.get(k) for k in [*taken, key]) for each in all_keys})
        if split > classes:
            taken, classes = [*taken, key], split
    return taken


def defense(keys: Keys, told: Keys) -> str:
    """A defense's name: what is not plain, then the keys that tell it from the others of the same choices."""
    parts = [keys[group] for group, plain in PLAIN.items() if keys.get(group, plain) != plain] or [NO_DEFENSE]
    name = " + ".join(parts)
    keys_told = [key for key in told if section(key) in DEFENSE and key not in PLAIN]
    rest = [_said(key.removeprefix("eraser."), told[key]) for key in keys_told]
    return f"{name} ({', '.join(rest)})" if rest else name


def _said(key: str, value: str) -> str:
    if key in FIRST:
        return f"no {key}" if value == NONE else value
    return f"{key}={value}"


def _once_a_seed(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """One case for each seed, a finished one if there is, and the repeats.

    What only a repeat has measured, a detector's AUROC or an eraser's control, is of the same model and is taken over.
    """
    kept: dict[tuple[object, ...], Case] = {}
    repeats = []
    for case in cases:
        if case.seeds not in kept:
            kept[case.seeds] = case
        elif (case.finished, len(case.curve.at)) > (kept[case.seeds].finished, len(kept[case.seeds].curve.at)):
            repeats.append(kept[case.seeds])
            kept[case.seeds] = case
        else:
            repeats.append(case)
    for case in repeats:
        own = kept[case.seeds]
        if own.finished and case.finished:
            kept[case.seeds] = replace(own, measures={**case.measures, **own.measures})
    return sorted(kept.values(), key=lambda case: tuple(map(natural, map(str, case.seeds)))), repeats


def _order(group: Group) -> tuple[object, ...]:
    """Runs before baselines, settings together, no defense first, then single defenses, then combined ones."""
    kinds = (FEDERATED, BESIDE)
    plain = sum(group.keys.get(key, value) != value for key, value in PLAIN.items())
    where = kinds.index(group.kind) if group.kind in kinds else len(kinds)
    return where, group.attacked, natural(group.setting), plain, natural(group.defense)


def natural(value: str) -> tuple[object, ...]:
    """Numbers by size, then words."""
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value
