"""What `fl-sim report` writes: a page, and tables in three formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fl_sim.errors import ConfigError
from fl_sim.folder import write_text
from fl_sim.report.page import page
from fl_sim.report.report import Report
from fl_sim.report.tables import cases_csv, comparisons_csv, configurations_csv, latex, markdown

ONE_FILE = (".html", ".csv", ".md", ".tex")
"""Names of which only that file is written; any other name is a folder for all."""


def check_target(out: Path) -> None:
    """Whether the report can be put there, asked before anything is read."""
    if out.suffix in ONE_FILE:
        if not out.parent.is_dir():
            raise ConfigError("-o", str(out), f"there is no folder {out.parent}")
        if out.is_dir():
            raise ConfigError("-o", str(out), "is a folder")
    elif out.exists() and not out.is_dir():
        raise ConfigError("-o", str(out), f"must be a folder, or a file that ends in {', '.join(ONE_FILE)}")


def write(report: Report, out: Path, title: str) -> list[Path]:
    """Write the report's files, or the one that `out` names; returns what was written."""
    makers: dict[str, Callable[[], str]] = {
        "report.html": lambda: page(report, title=title),
        "configurations.csv": lambda: configurations_csv(report),
        "cases.csv": lambda: cases_csv(report),
        "comparisons.csv": lambda: comparisons_csv(report),
        "table.md": lambda: markdown(report),
        "table.tex": lambda: latex(report),
    }
    if out.suffix in ONE_FILE:
        made = {out: next(make for name, make in makers.items() if name.endswith(out.suffix))()}
    else:
        made = {out / name: make() for name, make in makers.items()}
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("-o", str(out), f"can't make the folder: {error.strerror or error}") from error
    for path, content in made.items():
        write_text(path, content)
    return list(made)
