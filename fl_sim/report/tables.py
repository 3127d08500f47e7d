"""The tables of a report: CSV for programs, Markdown for a page, LaTeX for a paper."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fl_sim.report.cases import AUROC
from fl_sim.report.comparing import Comparison
from fl_sim.report.report import Measure, Report, cell
from fl_sim.report.wording import (
    BY_KEY,
    METHOD,
    NOTE,
    REFUSED_HEADINGS,
    REFUSED_NOTE,
    by_setting,
    left_out,
    marks,
    number,
    overview,
    p_value,
    refusals,
    seeds,
    sentence,
    setting_sentence,
)

if TYPE_CHECKING:
    from rich.table import Table

LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "†": r"$^{\dagger}$",
    "‡": r"$^{\ddagger}$",
    "·": r"$\cdot$",
    "²": "$^2$",
    "α": r"$\alpha$",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    **{char: f"{{{char}}}" for char in "[]*"},
}
"""Text for LaTeX. After the end of a row a bracket or a star would be taken for its options."""
LINES = 42
"""So many rows and rules fit on a page under the caption; a float that is longer is never set."""
SHOWN = ("acc", "asr", "asr_late", "held", "tpr", "fpr", "taken", "lost", "erasing_seconds")
"""The columns of the tables for people; the CSV has all."""


def configurations_csv(report: Report) -> str:
    """A row for each configuration: mean, half interval and n of every measure, and the keys that vary."""
    measures, keys = report.measures, list(report.grouped.varied)
    columns = [f"{measure.key}{part}" for measure in measures for part in ("", "_half_interval", "_n")]
    rows = []
    for group in report.groups:
        numbers: list[object] = []
        for measure in measures:
            found = cell(group, measure.key)
            numbers += [None, None, 0] if found is None else [found.mean, found.half, found.n]
        finished = sum(case.finished for case in group.cases)
        values = [group.varied.get(key) for key in keys]
        rows.append([group.kind, group.setting, group.defense, finished, *values, *numbers])
    # A key may be called as a column is: `kind` is one.
    headings = ["kind", "setting", "defense", "seeds", *(f"key:{key}" for key in keys), *columns]
    return _csv(headings, rows)


def cases_csv(report: Report) -> str:
    """A row for each case: one configuration under one seed, with its folder and command."""
    measures = report.measures
    rows = []
    for group in report.groups:
        for case in group.cases:
            source = report.sources[case.run]
            seed = " ".join(map(str, case.seeds))
            words = [
                group.kind,
                group.setting,
                group.defense,
                seed,
                source.state,
                source.folder,
                shlex.join(source.argv),
            ]
            rows.append([*words, *(case.measures.get(measure.key) for measure in measures)])
    headings = ["kind", "setting", "defense", "seed", "state", "folder", "command"]
    return _csv([*headings, *(measure.key for measure in measures)], rows)


def comparisons_csv(report: Report) -> str:
    """A row for each comparison with a control."""
    headings = ["kind", "setting", "defense", "against", "control", "measure", "n", "difference", "half_interval"]
    rows = []
    for each in report.comparisons:
        group, result = report.groups[each.group], each.paired
        words = [group.kind, group.setting, group.defense, each.against, report.groups[each.control].defense]
        numbers = [result.difference.n, result.difference.mean, result.difference.half]
        rows.append([*words, each.measure, *numbers, result.t_p, result.flip_p, each.holm_p, each.verdict])
    return _csv([*headings, "paired_t_p", "sign_flip_p", "holm_p", "verdict"], rows)


def _csv(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows(rows)
    return text.getvalue()


def markdown(report: Report) -> str:
    """The table, the sentences and the tests."""
    measures = _shown(report)
    lines = ["# Report", "", f"{overview(report)}.", ""]
    lines += _row(["setting", "defense", "n", *(measure.name for measure in measures)])
    lines.append(f"|---|---|---:|{'---:|' * len(measures)}")
    for index, group in enumerate(report.groups):
        lines += _row([group.setting, group.defense, seeds(group), *_cells(report, index, measures)])
    lines += ["", NOTE, "", "## In words", ""]
    for (_, setting), indexes in by_setting(report).items():
        lines += [f"**{_escaped(setting)}.** {_escaped(setting_sentence(report, indexes))}", ""]
        lines += [f"- {_escaped(report.groups[i].defense)}: {_escaped(sentence(report, i))}" for i in indexes]
        lines.append("")
    lines.pop()
    if report.comparisons:
        lines += ["", "## Comparisons", "", METHOD, ""]
        lines += _row([*COMPARED_HEADINGS])
        lines.append("|---|---|---|---|---:|---:|---:|---:|---:|---|")
        lines += [line for each in report.comparisons for line in _row(comparison_cells(report, each))]
    refused = refusals(report)
    if refused:
        lines += [
            "",
            "## Refused and failed",
            "",
            REFUSED_NOTE,
            "",
            *_row(REFUSED_HEADINGS),
            "|---|---|---:|---:|---|---:|",
        ]
        lines += [line for _, words, _ in refused for line in _row(words)]
        lines += [""] * any(said for *_, said in refused)
        for _, (setting, defense, *_), said in refused:
            lines += [f"- {_escaped(f'{setting}, {defense}, {each}')}" for each in said]
    lines_left = left_out(report)
    if lines_left:
        lines += ["", "## Left out", "", *(f"- {_escaped(line)}" for line in lines_left)]
    return "\n".join(lines) + "\n"


COMPARED_HEADINGS = (
    *("setting", "defense", "against", "measure", "n", "difference", "p (paired t)", "p (sign flips)"),
    *("p (Holm)", "verdict"),
)


def comparison_cells(report: Report, each: Comparison) -> list[str]:
    """A comparison as a row of words."""
    group, result = report.groups[each.group], each.paired
    measure = BY_KEY[each.measure]
    ps = [p_value(p) for p in (result.t_p, result.flip_p, each.holm_p)]
    difference = number(result.difference, measure)
    signed = difference if difference.startswith("-") else f"+{difference}"
    n = str(result.difference.n)
    return [group.setting, group.defense, each.against, measure.name, n, signed, *ps, each.verdict]


def latex(report: Report) -> str:
    """Tables for a paper, with booktabs, each no longer than a page; a block of rows for each setting."""
    measures = _shown(report)
    blocks = []
    for (_, setting), indexes in by_setting(report).items():
        head = f"\\multicolumn{{{len(measures) + 2}}}{{l}}{{\\textit{{{tex(setting)}}}}} \\\\"
        rows = [[report.groups[i].defense, seeds(report.groups[i]), *_cells(report, i, measures)] for i in indexes]
        said = [" & ".join(map(tex, row)) + " \\\\" for row in rows]
        blocks += [["\\midrule", head, *said[at : at + LINES - 2]] for at in range(0, len(said), LINES - 2)]
    pages: list[list[list[str]]] = [[]]
    for block in blocks:
        if pages[-1] and sum(map(len, pages[-1])) + len(block) > LINES:
            pages.append([])
        pages[-1].append(block)
    lines = ["% \\usepackage{booktabs,graphicx}"]
    for place, page in enumerate(pages, start=1):
        lines += _latex_table(measures, page, f"{overview(report)}. {NOTE}" if place == 1 else "Continued.", place)
    return "\n".join(lines) + "\n"


def _latex_table(measures: Sequence[Measure], blocks: Sequence[Sequence[str]], caption: str, place: int) -> list[str]:
    lines = [
        "\\begin{table}",
        "\\centering\\small",
        f"\\caption{{{tex(caption)}}}",
        f"\\label{{tab:fl-sim-{place}}}\\medskip",
        # As wide as the text at most; narrower tables keep their size.
        "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
        f"\\begin{{tabular}}{{lr{'r' * len(measures)}}}",
        "\\toprule",
        " & ".join(["defense", "$n$", *(tex(measure.name) for measure in measures)]) + " \\\\",
    ]
    for block in blocks:
        lines += block
    return [*lines, "\\bottomrule", "\\end{tabular}}", "\\end{table}"]


def tex(text: str) -> str:
    """Text that LaTeX takes as it is; a letter that it has no fonts for is named by its number."""
    return "".join(LATEX.get(char) or _letter(char) for char in " ".join(text.split()))


def _letter(char: str) -> str:
    return char if char.isascii() and char.isprintable() else f"U+{ord(char):04X}"


def _shown(report: Report) -> list[Measure]:
    return [measure for measure in report.measures if measure.key in SHOWN or measure.key.startswith(AUROC)]


def _cells(report: Report, index: int, measures: Sequence[Measure]) -> Iterator[str]:
    for measure in measures:
        yield number(cell(report.groups[index], measure.key), measure) + marks(report, index, measure.key)


def _row(cells: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(map(_escaped, cells))} |"]


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("\n", " ")


def terminal(report: Report) -> Table:
    """For the console: what people look at first."""
    from rich.table import Table  # imported late, as everything that only one command needs

    measures = [measure for measure in _shown(report) if measure.key in ("acc", "asr", "asr_late", "erasing_seconds")]
    table = Table()
    for heading in ("setting", "defense", "n", *(measure.name for measure in measures)):
        table.add_column(heading, justify="left" if heading in ("setting", "defense") else "right", overflow="fold")
    previous = None
    for index, group in enumerate(report.groups):
        said = group.setting if (group.kind, group.setting) != previous else ""
        previous = group.kind, group.setting
        table.add_row(said, group.defense, seeds(group), *_cells(report, index, measures))
    return table
