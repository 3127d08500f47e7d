"""The whole of a report: what was read, how it groups, what it comes to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fl_sim.errors import FolderError
from fl_sim.report.cases import AUROC, BEFORE, Case, understood
from fl_sim.report.comparing import Comparison, comparisons
from fl_sim.report.grouping import Group, Grouped, grouped
from fl_sim.report.reading import Run, Unread, read_runs
from fl_sim.report.statistics import Estimate, estimate


@dataclass(frozen=True)
class Measure:
    """One number of a case: how it is called and written."""

    key: str
    name: str
    about: str
    digits: int = 3
    better: int = 0
    """1: more is better; -1: less is; 0: neither."""


MEASURES = (
    Measure("acc", "ACC", "clean accuracy at the end", better=1),
    Measure("asr", "ASR", "attack success rate at the end", better=-1),
    Measure("acc_late", "late ACC", "mean ACC over the last third of the rounds", better=1),
    Measure("asr_late", "late ASR", "mean ASR over the last third of the rounds", better=-1),
    Measure("asr_max", "highest ASR", "the highest ASR of the run, erasings' own before-scores included", better=-1),
    Measure("ra", "RA", "stamped images predicted as their true class, at the end", better=1),
    Measure("der", "DER", "defense effectiveness rating, mean over the accepted erasings", better=1),
    Measure("held", "rounds held", "rounds until ASR is above half of what an erasing found; at least", 1, 1),
    Measure("tpr", "TPR", "share of the attackers' updates that were rejected, mean over the rounds", better=1),
    Measure("fpr", "FPR", "share of the honest clients' updates that were rejected, mean over the rounds", better=-1),
    Measure("taken", "erasings taken", "share of the erasings whose model the server took; it refuses some", better=1),
    Measure(
        "lost", "updates lost", "share of the updates asked for that the server refused, missed or skipped", better=-1
    ),
    Measure("skipped", "rounds skipped", "share of the rounds in which too few updates were left", better=-1),
    Measure("erasing_seconds", "erasing s", "seconds that erasing took in all", 1, -1),
    Measure("seconds", "seconds", "seconds of all rounds, erasing included", 1, -1),
)
USUAL = {"taken": 1.0, "lost": 0.0, "skipped": 0.0}
"""What needs no column as long as it is so everywhere."""


@dataclass(frozen=True)
class Source:
    """A run as the report names it; its events are not kept."""

    folder: Path
    argv: Sequence[str]
    config: Mapping[str, object]
    device: str
    state: str
    central: bool


@dataclass(frozen=True)
class Report:
    """Everything that a report shows."""

    sources: Sequence[Source]
    grouped: Grouped
    comparisons: Sequence[Comparison]
    unread: Sequence[Unread]

    @property
    def groups(self) -> Sequence[Group]:
        return self.grouped.groups

    @cached_property
    def measures(self) -> Sequence[Measure]:
        """Those that any case has; that nothing was refused or skipped takes no column."""
        known = {
            key
            for group in self.groups
            for case in group.cases
            for key, value in case.measures.items()
            if USUAL.get(key) != value
        }
        found = [measure for measure in MEASURES if measure.key in known]
        about = "how well this detector tells stamped test images from clean ones{}: 1 always, 0.5 by chance"
        for key in sorted(key for key in known if key.startswith(f"{AUROC} ")):
            when = " on the model that the last erasing found" if key.endswith(BEFORE) else ""
            found.append(Measure(key, key.replace(AUROC, "AUROC"), about.format(when), better=1))
        return found

    @cached_property
    def detectors(self) -> Mapping[str, tuple[str | None, str | None]]:
        """Each detector of stamped inputs, and its measures: on the model before the last erasing, on the final one."""
        known = {measure.key for measure in self.measures if measure.key.startswith(f"{AUROC} ")}
        names = sorted({key.removeprefix(f"{AUROC} ").removesuffix(BEFORE) for key in known})
        keys = {name: (f"{AUROC} {name}{BEFORE}", f"{AUROC} {name}") for name in names}
        return {name: (b if b in known else None, f if f in known else None) for name, (b, f) in keys.items()}

    def against(self, number: int, measure: str) -> dict[str, Comparison]:
        """A group's comparisons in one measure, by the control's name."""
        return {c.against: c for c in self.comparisons if c.group == number and c.measure == measure}


def cell(group: Group, measure: str) -> Estimate | None:
    """What a group comes to in one measure."""
    return estimate(case.measures.get(measure) for case in group.cases)


def report_on(folders: Sequence[str | os.PathLike[str]]) -> Report:
    """Read, group and compare all runs in the folders; a `RunError` if there is none."""
    sources: list[Source] = []
    cases: list[Case] = []
    unread: list[Unread] = []
    for found in read_runs(folders):
        if isinstance(found, Unread):
            unread.append(found)
            continue
        own = understood(found, len(sources))
        if isinstance(own, Unread):
            unread.append(own)
            continue
        if not any(case.curve.at or case.measures for case in own):
            unread.append(Unread(found.folder, "it holds no scores yet"))
            continue
        device = str(found.meta.get("device", ""))
        sources.append(Source(found.folder, found.argv, found.config, device, _state(found, own), found.central))
        cases += own
    if not sources:
        said = "; ".join(f"{each.folder}: {each.reason}" for each in unread[:3])
        raise FolderError(f"nothing to report: {said or 'no folders'}")
    groups = grouped(cases)
    return Report(sources, groups, comparisons(groups.groups), unread)


def _state(run: Run, cases: Sequence[Case]) -> str:
    if run.finished:
        return "finished"
    last = max((case.curve.at[-1] for case in cases if case.curve.at), default=0)
    return f"unfinished: epoch {last}" if run.central else f"unfinished: round {last} of {run.config.get('rounds')}"
