"""The table of centralized baselines, over one seed or several."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_sim.folder import write_text

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("acc", "acc_non_target", "asr", "ra", "der", "seconds")
HEADINGS = ("", "ACC", "ACC, others", "ASR", "RA", "DER", "seconds")


def interval(values: Iterable[float | None]) -> tuple[float, float | None] | None:
    """The mean and half its 95 % interval (Student's t); None where there is no value, no interval of a single one."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if len(known) < 2:
        return known[0], None
    from scipy.stats import t as student  # imported late: it takes half a second

    half = float(student.ppf(0.975, len(known) - 1)) * statistics.stdev(known) / len(known) ** 0.5
    return statistics.mean(known), half


def columns(summaries: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The headings by column: the scores, and the AUROC of each detector that was tried."""
    detectors = dict.fromkeys(d["detector"] for summary in summaries for d in summary.get("detections", []))
    *scores, seconds = zip(COLUMNS, HEADINGS[1:], strict=True)
    return dict([*scores, *((f"auroc_{name}", f"AUROC {name}") for name in detectors), seconds])


def rows(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """By method, the victim first: each column's values over the seeds."""
    shown = columns(summaries)
    found: dict[str, dict[str, list[float | None]]] = {}
    for summary in summaries:
        detected: dict[str, dict[str, Any]] = {}
        for each in summary.get("detections", []):
            detected.setdefault(each["model"], {})[f"auroc_{each['detector']}"] = each["auroc"]
        for result in [summary | {"eraser": "victim"}, *summary["erasers"]]:
            name = result["eraser"]
            row = found.setdefault(name, {column: [] for column in shown})
            for column in shown:
                row[column].append((result | detected.get(name, {})).get(column))
    return found


def cell(column: str, values: Iterable[float | None]) -> str:
    found = interval(values)
    if found is None:
        return "–"
    digits = 1 if column == "seconds" else 3
    mean, half = found
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} ± {half:.{digits}f}"


def central_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """For the terminal."""
    from rich.table import Table

    table = Table()
    table.add_column("", justify="left")
    for heading in columns(summaries).values():
        table.add_column(heading, justify="right")
    for method, row in rows(summaries).items():
        table.add_row(method, *(cell(column, values) for column, values in row.items()))
    return table


def write_tables(summaries: Sequence[dict[str, Any]], folder: Path) -> None:
    """`table.md` and `table.csv`."""
    shown = columns(summaries)
    lines = [f"|  | {' | '.join(shown.values())} |", f"|---{'|---:' * len(shown)}|"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seeds", *(f"{column}{part}" for column in shown for part in ("", "_half_interval"))])
    for method, row in rows(summaries).items():
        lines.append(f"| {method} | {' | '.join(cell(column, values) for column, values in row.items())} |")
        numbers = [part for values in row.values() for part in (interval(values) or (None, None))]
        writer.writerow([method, len(row["acc"]), *numbers])
    write_text(folder / "table.md", "\n".join(lines) + "\n")
    write_text(folder / "table.csv", text.getvalue())
