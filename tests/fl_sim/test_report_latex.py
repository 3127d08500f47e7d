"""The LaTeX table: read by a parser stricter than LaTeX, and compiled where there is a pdflatex."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import made
import pytest

from fl_sim.report.report import report_on
from fl_sim.report.tables import LINES, latex, tex

PDFLATEX = shutil.which("pdflatex") or ""
DOCUMENT = r"""\documentclass{article}
\usepackage{booktabs,graphicx}
\begin{document}
\input{table.tex}
\end{document}
"""
KNOWN = {
    *("caption", "label", "centering", "small", "medskip", "toprule", "midrule", "bottomrule", "multicolumn", "textit"),
    *("resizebox", "ifdim\\width>", "width", "linewidth", "else", "fi"),
    *("textbackslash", "textasciitilde", "textasciicircum", "pm", "dagger", "ddagger", "cdot", "alpha"),
}
"""Commands of LaTeX itself, booktabs and graphicx that a table may use."""
TOKEN = re.compile(r"\\ifdim\\width>|\\(?:begin|end)\{\w+\}(?:\{\w+\})?|\\[A-Za-z]+|\\.|%\n|.", re.DOTALL)
NASTY = "50% of a_b & {c} ~ \\ ^ $1 #2 <x> | [y] * \u00fc \u4e2d \t \n\n ±"


def faults(text: str) -> list[str]:
    """What is wrong with a table: its characters, commands, braces, environments, and the columns of its rows."""
    found = [] if text.isascii() else ["not ASCII"]
    text = re.sub(r"^%.*\n", "", text, flags=re.MULTILINE)
    found += ["an empty line"] * bool(re.search(r"\n\s*\n", text))
    found += ["options after a row"] * bool(re.search(r"\\\\\s*[\[*]", text))
    opened: list[str] = []
    math, columns, cells = False, 0, 1
    for token in TOKEN.findall(re.sub(r"\\multicolumn\{(\d+)\}", lambda m: "&" * (int(m[1]) - 1), text)):
        if environment := re.fullmatch(r"\\(begin|end)\{(\w+)\}(?:\{(\w+)\})?", token):
            kind, name, given = environment.groups()
            if kind == "begin":
                opened.append(name)
                columns, cells = len(given or ""), 1
            elif not opened or opened.pop() != name:
                found.append(f"{name} ends where it was not begun")
        elif token == "{":
            opened.append("{")
        elif token == "}":
            found += [] if opened and opened.pop() == "{" else ["a brace closes what is not open"]
        elif token == "$":
            math = not math
        elif token == "&":
            found += [] if opened[-1:] == ["tabular"] else ["& where there are no columns"]
            cells += 1
        elif token == "\\\\":
            found += [] if cells == columns else [f"a row of {cells} columns instead of {columns}"]
            cells = 1
        elif token in "#~%" or (token in "_^<>|" and not math):
            found.append(f"a bare {token}")
        elif re.match(r"\\[A-Za-z]", token):
            found += [] if token[1:] in KNOWN else [f"{token} is no command that we know"]
    return found + [f"{name} is not closed" for name in opened] + ["$ is not closed"] * math


def sweep(folder: Path, attacks: int = 2) -> str:
    """The table of attacks by three defenses, with names that a user may think of; five seeds if there are two."""
    for attack in range(attacks):
        for eraser, asr in (("none", 0.9), ("fine_tune", 0.4), ("[nad]*", 0.2)):
            for seed in range(5 if attacks == 2 else 1):
                erase = [made.erase(1, (0.9, 0.9), (0.8, asr), eraser=eraser)] if eraser != "none" else []
                scores = [(0.9, asr + seed / 100), (0.9, asr + seed / 50)]
                name = f"{attack}-{eraser[1:3]}-{seed}"
                made.run(folder / name, seed, scores, *erase, eraser=eraser, attack=f"{NASTY} {attack}")
    return latex(report_on([folder]))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sweep(tmp_path_factory.mktemp("runs"))


def test_the_table_is_whole(table: str) -> None:
    """Two settings; nad is 0.7 below no defense in every seed, whose sign flips can't tell it from chance with five."""
    assert faults(table) == []
    assert table.count("\\midrule") == 2
    assert "0.900 $\\pm$ 0.000" in table
    assert "fine\\_tune & 5 & " in table


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("\\_", "_", "a bare _"),
        ("\\%", "%", "a bare %"),
        (" & ", " ", "a row of"),
        ("\\end{tabular}", "", "ends where it was not begun"),
        ("\\textit{", "\\textit", "a brace closes"),
        ("$\\pm$", "$\\pm", "$ is not closed"),
        ("\\midrule", "\\hrule", "no command that we know"),
        ("\\toprule\n", "\\toprule\n\n", "an empty line"),
        ("\n{[}", "\n[", "options after a row"),
        ("U+4E2D", "\u4e2d", "not ASCII"),
    ],
)
def test_the_parser_sees_what_latex_would(table: str, old: str, new: str, said: str) -> None:
    """One mistake in a good table; were the parser blind to it, the test above would prove nothing."""
    assert old in table
    assert any(said in each for each in faults(table.replace(old, new, 1)))


def test_latex_takes_any_text() -> None:
    assert tex("50% of a_b & {c} ~ \\ ^ $1 #2\n [*] \u4e2d") == (
        r"50\% of a\_b \& \{c\} \textasciitilde{} \textbackslash{} \textasciicircum{} \$1 \#2 {[}{*}{]} U+4E2D"
    )


def test_a_long_table_is_cut_into_pages(tmp_path: Path) -> None:
    """Settings of a rule, a heading and three rows: eight of them, 40 lines, are a page."""
    text = sweep(tmp_path, attacks=10)
    tables = text.split("\\begin{table}")[1:]
    assert [each.count("\\midrule") for each in tables] == [8, 2]
    assert tables[0].count("\\\\\n") - 1 + 8 <= LINES
    assert faults(text) == []
    assert len(set(re.findall(r"\\label\{(.*?)\}", text))) == 2


def test_a_long_setting_is_cut_too(tmp_path: Path) -> None:
    """60 erasers in one setting: 40 rows beside the rule and the heading, then 20."""
    for number in range(60):
        made.run(tmp_path / f"{number}", 0, [(0.9, 0.1)], eraser=f"eraser_{number}")
    text = latex(report_on([tmp_path]))
    assert [each.count("eraser\\_") for each in text.split("\\begin{table}")[1:]] == [40, 20]
    assert faults(text) == []


@pytest.mark.slow
@pytest.mark.skipif(not PDFLATEX, reason="needs pdflatex")
@pytest.mark.parametrize("attacks", [2, 30])
def test_the_table_compiles_and_fits(tmp_path: Path, attacks: int) -> None:
    (tmp_path / "table.tex").write_text(sweep(tmp_path / "runs", attacks))
    (tmp_path / "paper.tex").write_text(DOCUMENT)
    words = [PDFLATEX, "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
    assert "too large" not in done.stdout
    assert (tmp_path / "paper.pdf").stat().st_size > 5000
