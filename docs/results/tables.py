"""What the commands of these pages share: making many runs, finding the finished ones, intervals of means."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import t as student

from fl_sim.sweep import side_by_side


@dataclass(frozen=True)
class Finished:
    """A finished run, as its folder tells it."""

    config: dict[str, Any]
    summary: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def choices(self) -> dict[str, str]:
        chosen: dict[str, str] = self.config["choices"]
        return chosen

    def last(self, key: str, rounds: int = 10) -> float | None:
        """The mean over the last rounds, which one round's cohort sways less than the final value."""
        measured = [event for event in self.events if event["event"] == "round"][-rounds:]
        return mean(event.get(key) for event in measured)

    def erased(self, key: str) -> float | None:
        """The mean over the run's erasings."""
        return mean(event[key] for event in self.summary["erasings"])


def mean(values: Iterator[float | None]) -> float | None:
    """Of those that are there; None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def make(wanted: Sequence[list[str]], processes: int) -> None:
    """Execute runs, a line each; those that are finished already are found."""
    print(f"{len(wanted)} runs, {processes} at a time", flush=True)
    for number, outcome in enumerate(side_by_side(wanted, processes), start=1):
        print(f"[{number}/{len(wanted)}] {' '.join(outcome.job)}: {outcome.state}", flush=True)
        if outcome.complaint:
            print(outcome.complaint, file=sys.stderr, flush=True)


def finished(folder: Path) -> Iterator[Finished]:
    """The finished runs of a sweep's folder."""
    for path in sorted(folder.glob("*/done")):
        lines = (path.parent / "metrics.jsonl").read_text().splitlines()
        yield Finished(
            yaml.safe_load((path.parent / "config.yaml").read_text()),
            json.loads((path.parent / "summary.json").read_text()),
            [json.loads(line) for line in lines],
        )


def comebacks(runs: Sequence[Finished]) -> tuple[int, list[int]]:
    """How many erasings met a standing backdoor, and how soon it came back after those that it did.

    Standing: ASR 0.5 or more before. The last round's are left out: no round shows what came after.
    """
    met = [
        erasing
        for run in runs
        for erasing in run.summary["erasings"]
        if erasing["accepted"] and (erasing["asr_before"] or 0) >= 0.5 and erasing["round"] < run.summary["rounds"]
    ]
    return len(met), [e["rounds_until_back"] for e in met if e["rounds_until_back"] is not None]


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean (Student's t)."""
    return float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def interval(values: Sequence[float | None], digits: int = 2) -> str:
    """Mean ± half the 95 % interval of the mean."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    if len(known) < 2:
        return f"{known[0]:.{digits}f}"
    return f"{statistics.mean(known):.{digits}f} ± {half_width(known):.{digits}f}"
