"""The notebook in docs: every cell works as it stands there, and the file is one that Jupyter opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "first_steps.ipynb"
KEYS = {
    "markdown": {"cell_type", "id", "metadata", "source"},
    "code": {"cell_type", "id", "metadata", "source", "execution_count", "outputs"},
}
"""What nbformat 4.5 demands of a cell; it allows nothing else."""


def cells(kind: str | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in found if kind in (None, cell["cell_type"])]


def test_the_notebook_is_one() -> None:
    """By the rules of nbformat 4.5, without the package: it would bring nine others for this one test."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in cells():
        assert set(cell) == KEYS[cell["cell_type"]]
        assert all(isinstance(line, str) for line in cell["source"])
    names = [cell["id"] for cell in cells()]
    assert len(set(names)) == len(names)


def test_its_outputs_are_small_and_those_of_one_execution() -> None:
    """From the first cell to the last, none of them an error, and less than a picture's size in the repository."""
    assert [cell["execution_count"] for cell in cells("code")] == list(range(1, len(cells("code")) + 1))
    kinds = {output["output_type"] for cell in cells("code") for output in cell["outputs"]}
    assert kinds == {"execute_result", "display_data"}
    assert NOTEBOOK.stat().st_size < 150_000


def test_its_links_lead_somewhere() -> None:
    text = "".join(line for cell in cells("markdown") for line in cell["source"])
    targets = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert targets
    assert all((NOTEBOOK.parent / target).is_file() for target in targets)


def test_every_cell_works(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one namespace, as Jupyter does; what the text says of the tables and the picture holds."""
    pytest.importorskip("pandas")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    there: dict[str, Any] = {}
    for number, cell in enumerate(cells("code"), start=1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), there)
    there["plt"].close(there["figure"])
    assert len(list((cwd / "runs").rglob("done"))) == len(there["runs"]) == 4
    assert there["by_seed"].index.tolist() == [0, 1, "mean"]
    erasings = there["erasings"]
    assert erasings["seed"].tolist() == [0, 1]
    assert (erasings["asr"] < 0.1).all()
    assert (erasings["asr_before"] > 0.9).all()
    assert set(there["runs"]["clients"]) == {20}
    for panel in there["panels"]:
        assert {line.get_label() for line in panel.lines} >= {"none", "fine_tune"}
        assert [len(line.get_xdata()) for line in panel.lines if line.get_label() == "none"] == [10]
