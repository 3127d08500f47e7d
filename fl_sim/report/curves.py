"""Curves over seeds: means and bands by round, and what ASR does after an erasing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fl_sim.report.cases import Case
from fl_sim.report.grouping import Group
from fl_sim.report.statistics import quantile

Numbers: TypeAlias = list[float | None]


@dataclass(frozen=True)
class Band:
    """A mean over seeds at each point, half its 95 % interval (None for one seed), and the number of seeds."""

    at: Sequence[int]
    mean: Numbers
    half: Numbers
    n: Sequence[int]


def band(at: Sequence[int], rows: Sequence[Sequence[float | None]]) -> Band:
    """The band of several curves over the same points; None where a curve has no value."""
    values: NDArray[np.float64] = np.array(rows, dtype=np.float64).reshape(len(rows), len(at))
    known = np.isfinite(values)
    n = known.sum(0)
    sums = np.where(known, values, 0.0).sum(0)
    mean = sums / np.maximum(n, 1)
    squares = (np.where(known, values - mean, 0.0) ** 2).sum(0)
    spread = np.sqrt(squares / np.maximum(n - 1, 1) / np.maximum(n, 1))
    quantiles = {int(count): quantile(int(count)) if count > 1 else math.nan for count in np.unique(n)}
    half = spread * np.array([quantiles[int(count)] for count in n])
    mean[n == 0] = math.nan
    return Band(at, plain(mean), plain(half), [int(count) for count in n])


def plain(values: NDArray[np.float64]) -> Numbers:
    return [round(value, 4) if math.isfinite(value) else None for value in values.tolist()]


def curve_bands(group: Group) -> dict[str, Band]:
    """ACC and ASR by round. A round after which it was erased has two points: what the eraser found, then the end."""
    points = {(at, 1) for case in group.cases for at in case.curve.at}
    points |= {(each.round, 0) for case in group.cases for each in case.erasings if (each.round, 1) in points}
    order = sorted(points)
    bands = {}
    for key in ("acc", "asr"):
        rows = [_at(case, key, order) for case in group.cases]
        if any(value is not None for row in rows for value in row):
            bands[key] = band([at for at, _ in order], rows)
    return bands


def _at(case: Case, key: str, order: Sequence[tuple[int, int]]) -> Numbers:
    """A case's values at the points; a seed that was not erased in a round is the same before and after."""
    after: dict[int, float | None] = dict(zip(case.curve.at, getattr(case.curve, key), strict=True))
    before: dict[int, float | None] = {each.round: getattr(each, f"{key}_before") for each in case.erasings}
    return [before[at] if not late and at in before else after.get(at) for at, late in order]


def erasing_marks(group: Group) -> list[tuple[int, int, int]]:
    """Rounds with erasings: the round, how many seeds took the erased model, how many refused it."""
    counts: dict[int, list[int]] = {}
    for case in group.cases:
        for each in case.erasings:
            counts.setdefault(each.round, [0, 0])[0 if each.accepted else 1] += 1
    return [(at, taken, refused) for at, (taken, refused) in sorted(counts.items())]


def durability(group: Group) -> Band | None:
    """ASR by rounds since an erasing: a seed's mean over its accepted erasings first, then over seeds."""
    rows: list[Mapping[int, float]] = []
    for case in group.cases:
        values: dict[int, list[float]] = {}
        for each in case.erasings:
            if each.accepted:
                for since, asr in each.after:
                    values.setdefault(since, []).append(asr)
        if values:
            rows.append({since: sum(known) / len(known) for since, known in values.items()})
    order = sorted({since for row in rows for since in row})
    if len(order) < 2 or not group.attacked:
        return None
    return band(order, [[row.get(since) for since in order] for row in rows])


def packed(found: Band) -> dict[str, Any]:
    """A band for the page; the counts only if they change."""
    content: dict[str, Any] = {"at": found.at, "mean": found.mean, "half": found.half}
    if len(set(found.n)) > 1:
        content["n"] = found.n
    return content
