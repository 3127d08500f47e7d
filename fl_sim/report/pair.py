"""Two runs side by side: where their configurations differ, and what came of each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_sim.errors import FolderError
from fl_sim.report.cases import FEDERATED, Case, Curve, text, understood
from fl_sim.report.frame import typed
from fl_sim.report.reading import Run, Unread, read_run
from fl_sim.report.report import MEASURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

SHOWN = 12
"""About so many rounds stand in the console's table."""
ABSENT = "–"
UNTOLD = ("name", "output")
COLOURS = ("#0072B2", "#D55E00")  # Okabe & Ito; the second run is dashed besides


@dataclass(frozen=True)
class Pair:
    """Two runs, the keys in which they differ, and their cases by defense."""

    names: tuple[str, str]
    differences: Mapping[str, tuple[str, str]]
    cases: Mapping[str, tuple[Case | None, Case | None]]


def pair(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> Pair:
    """Read both; a `RunError` if one of them can't be."""
    runs = [_read(Path(folder)) for folder in (first, second)]
    configs = [typed(run.config) for run in runs]
    keys = [key for key in {key: None for config in configs for key in config} if key not in UNTOLD]
    values = {key: tuple(_said(config, key) for config in configs) for key in keys}
    differences = {key: (each[0], each[1]) for key, each in values.items() if each[0] != each[1]}
    cases: dict[str, list[Case | None]] = {}
    for place, run in enumerate(runs):
        own = understood(run, place)
        if isinstance(own, Unread):
            raise FolderError(f"can't read {own.folder}: {own.reason}")
        for case in own:
            # Two federated runs are set against each other whatever they are defended by.
            name = FEDERATED if case.kind == FEDERATED else f"{case.kind}, {case.keys['eraser']}"
            cases.setdefault(name, [None, None])[place] = case
    return Pair((str(first), str(second)), differences, {name: (each[0], each[1]) for name, each in cases.items()})


def _read(folder: Path) -> Run:
    found = read_run(folder)
    if isinstance(found, Unread):
        raise FolderError(f"can't read {folder}: {found.reason}")
    return found


def _said(config: Mapping[str, Any], key: str) -> str:
    return text(config[key]) if key in config else ABSENT


def difference_table(found: Pair) -> Table:
    """The keys in which two runs differ."""
    from rich.table import Table

    table = Table("", "1", "2")
    for key, values in found.differences.items():
        table.add_row(key, *values)
    return table


def number_table(found: Pair) -> Table:
    """What came of each, and the second less the first."""
    from rich.table import Table

    table = Table()
    for heading in ("", "1", "2", "difference"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, cases in found.cases.items():
        for measure in MEASURES:
            values = [None if case is None else case.measures.get(measure.key) for case in cases]
            known = [value for value in values if value is not None]
            if known:
                shown = (ABSENT if value is None else f"{value:.{measure.digits}f}" for value in values)
                change = f"{known[1] - known[0]:+.{measure.digits}f}" if len(known) == 2 else ABSENT
                label = measure.name if len(found.cases) == 1 else f"{name}: {measure.name}"
                table.add_row(label, *shown, change)
    return table


def curve_table(found: Pair) -> Table:
    """ACC and ASR of both in some of the rounds; an erasing's round is always among them, with `*`."""
    from rich.table import Table

    curves = _curves(found)
    table = Table()
    for heading in ("round", *(f"{score} {place}" for score in ("ACC", "ASR") for place in (1, 2))):
        table.add_column(heading, justify="right")
    erased = {each.round for cases in found.cases.values() for case in cases if case for each in case.erasings}
    at = sorted({t for curve in curves for t in curve.at})
    step = max(1, -(-len(at) // SHOWN))
    for t in [t for place, t in enumerate(at, start=1) if place % step == 0 or t in erased or t in (at[0], at[-1])]:
        values = []
        for score in ("acc", "asr"):
            for curve in curves:
                value = dict(zip(curve.at, getattr(curve, score), strict=True)).get(t)
                values.append(ABSENT if value is None else f"{value:.3f}")
        table.add_row(f"{t}*" if t in erased else str(t), *values)
    return table


def _curves(found: Pair) -> tuple[Curve, Curve]:
    """The curve of each run: that of its federated model, or that of its victim."""
    curves = []
    for place in (0, 1):
        own = [cases[place] for cases in found.cases.values()]
        curves.append(next((case.curve for case in own if case is not None), Curve()))
    return curves[0], curves[1]


def draw(found: Pair, path: Path) -> None:
    """ACC and ASR of both runs, beside the keys in which they differ."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported late: it takes half a second
    from matplotlib.figure import Figure

    lines = [f"{key}: {first} | {second}" for key, (first, second) in found.differences.items()]
    figure = Figure(figsize=(11, 4 + 0.17 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=(4, 0.2 + 0.17 * len(lines)))
    top, bottom = halves
    left, right = top.subplots(1, 2, sharey=True)
    for axes, key in ((left, "acc"), (right, "asr")):
        _draw_score(axes, found, key)
    left.set_ylabel("share of test images")
    handles, labels = left.get_legend_handles_labels()
    top.legend(handles, labels, loc="outside upper center", ncols=1, frameon=False)
    bottom.text(0.02, 0.98, "\n".join(["1 | 2", *lines]), va="top", family="monospace", fontsize=8)
    figure.savefig(path, dpi=130)


def _draw_score(axes: Axes, found: Pair, key: str) -> None:
    for place, (name, curve) in enumerate(zip(found.names, _curves(found), strict=True)):
        own = [each for cases in found.cases.values() if (case := cases[place]) for each in case.erasings]
        before = {each.round: getattr(each, f"{key}_before") for each in own}
        scores = zip(curve.at, getattr(curve, key), strict=True)
        points = [(t, y) for t, score in scores for y in (before.get(t), score) if y is not None]
        if points:
            style = "--" if place else "-"
            axes.plot(
                *zip(*points, strict=True), style, label=f"{place + 1}: {name}", color=COLOURS[place], linewidth=1.8
            )
        for each in own:
            axes.axvline(each.round, color=COLOURS[place], linestyle=":", linewidth=1, alpha=0.7, zorder=0)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("round (dotted: erasing)")
    axes.set_title(key.upper(), fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
