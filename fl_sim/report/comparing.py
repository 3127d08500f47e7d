"""Every defense against its controls, seed by seed: no defense, and fine-tuning on the same schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fl_sim.report.cases import NONE
from fl_sim.report.grouping import DEFENSE, NO_DEFENSE, PLAIN, Group, section
from fl_sim.report.statistics import LEVEL, Paired, holm, paired

COMPARED = {"asr_late": -1, "asr": -1, "acc": 1}
"""The measures that are compared, and whether more is better (1) or worse (-1)."""
NO_EVIDENCE = "no evidence of a difference"
LEAST = 3
"""Pairs that it takes for a verdict: from two, of scores that end at 0 and 1, nobody can tell how much they vary."""


@dataclass(frozen=True)
class Control:
    """What a defense is compared with: these choices, in the same setting; the sections in `free` need not be equal."""

    name: str
    choices: Mapping[str, str]
    free: Sequence[str]


CONTROLS = (
    Control(NO_DEFENSE, PLAIN, DEFENSE),
    Control("fine-tuning", {"eraser": "fine_tune"}, ("eraser",)),
)


@dataclass(frozen=True)
class Comparison:
    """One measure of a defense against one control, over the seeds that both have."""

    group: int
    control: int
    against: str
    measure: str
    paired: Paired
    holm_p: float | None = None
    """p after Holm's correction over all comparisons of the same measure."""

    @property
    def verdict(self) -> str:
        """`better` and `worse` only if the corrected p is below 0.05."""
        if self.holm_p is None:
            return "too few seeds"
        if self.holm_p >= LEVEL:
            return NO_EVIDENCE
        return "better" if self.paired.difference.mean * COMPARED[self.measure] > 0 else "worse"


def comparisons(groups: Sequence[Group]) -> list[Comparison]:
    """Every group against each of its controls, in every measure that both have."""
    found = []
    settings: dict[tuple[str, frozenset[tuple[str, str]]], list[int]] = {}
    for number, group in enumerate(groups):
        settings.setdefault(setting(group), []).append(number)
    for number, group in enumerate(groups):
        for control in CONTROLS:
            other = control_of(group, control, groups, settings[setting(group)])
            if other is None:
                continue
            for measure in COMPARED if group.attacked else ("acc",):  # an ASR without attack is nothing to defend
                differences = _differences(group, groups[other], measure)
                result = paired(differences)
                if result is not None:
                    found.append(Comparison(number, other, control.name, measure, result))
    return [corrected for measure in COMPARED for corrected in _corrected(found, measure)]


def setting(group: Group) -> tuple[str, frozenset[tuple[str, str]]]:
    """What two groups must share to be compared: everything but the defense."""
    return group.kind, frozenset(item for item in group.keys.items() if section(item[0]) not in DEFENSE)


def control_of(group: Group, control: Control, groups: Sequence[Group], candidates: Sequence[int]) -> int | None:
    """The control of a group among those of its setting; of several, the one that shares most of its other keys."""
    if all(group.keys.get(key, NONE) == choice for key, choice in control.choices.items() if key in group.keys):
        return None  # it is one itself
    if control.free == ("eraser",) and group.keys.get("eraser", NONE) == NONE:
        return None  # fine-tuning is the control of erasers
    fitting = []
    for number in candidates:
        other = groups[number]
        has = all(other.keys.get(key, choice) == choice for key, choice in control.choices.items())
        strict = [key for key in {*group.keys, *other.keys} if section(key) in DEFENSE]
        same = all(group.keys.get(key) == other.keys.get(key) for key in strict if section(key) not in control.free)
        if other is not group and has and same:
            shared = len(set(group.keys.items()) & set(other.keys.items()))
            fitting.append((-shared, number))
    return min(fitting)[1] if fitting else None


def _differences(group: Group, control: Group, measure: str) -> list[float]:
    """The group's value less its control's, for every seed that both have finished."""
    own, other = group.by_seed(), control.by_seed()
    pairs = ((own[seed].measures.get(measure), other[seed].measures.get(measure)) for seed in own if seed in other)
    return [value - reference for value, reference in pairs if value is not None and reference is not None]


def _corrected(found: Sequence[Comparison], measure: str) -> list[Comparison]:
    tested = [each for each in found if each.measure == measure]
    enough = [each for each in tested if each.paired.difference.n >= LEAST]
    known = [(each, p) for each in enough if (p := each.paired.p) is not None]
    adjusted = dict(zip((id(each) for each, _ in known), holm([p for _, p in known]), strict=True))
    return [replace(each, holm_p=adjusted.get(id(each))) for each in tested]
