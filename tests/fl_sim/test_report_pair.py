"""`fl-sim compare`: two runs side by side."""

from __future__ import annotations

import os
from pathlib import Path

import made
import pytest

from fl_sim.cli import OK, USAGE, main
from fl_sim.report.pair import pair

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def two(cwd: Path) -> Path:
    made.run(cwd / "a", 0, [(0.5, 0.25), (0.75, 0.5), (0.8, 0.7)], clients=20)
    erase = made.erase(2, (0.7, 0.9), (0.7, 0.1))
    made.run(cwd / "b", 0, [(0.5, 0.25), (0.7, 0.1), (0.8, 0.2)], erase, clients=20, eraser=("nad", {"lr": 0.1}))
    return cwd


def test_the_differences_and_no_more(two: Path) -> None:
    """Equal keys, names and places are not told; a key that only one has is."""
    found = pair("a", "b")
    assert found.differences == {"eraser": ("none", "nad"), "eraser.lr": ("–", "0.1")}
    first, second = found.cases["federated"]
    assert first is not None
    assert second is not None
    assert (first.measures["asr"], second.measures["asr"]) == (0.7, 0.2)


def test_the_console_shows_keys_numbers_and_curves(two: Path, capsys: Capture) -> None:
    assert main(["compare", "a", "b"]) == OK
    words = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["eraser", "none", "nad"] in words
    assert ["ASR", "0.700", "0.200", "-0.500"] in words
    assert ["2*", "0.750", "0.700", "0.500", "0.100"] in words
    assert sorted(os.listdir(two)) == ["a", "b"]


@pytest.mark.parametrize("name", ["out.png", "out.svg", "out.html"])
def test_a_picture_or_a_page(two: Path, name: str) -> None:
    assert main(["compare", "a", "b", "-o", name]) == OK
    assert (two / name).stat().st_size > 5000


def test_equal_runs_and_unfinished_ones(two: Path, capsys: Capture) -> None:
    made.run(two / "c", 0, [(0.5, 0.25)], clients=20, planned=3, done=False)
    assert main(["compare", "a", "c"]) == OK
    assert "their configurations are the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["a"], USAGE, "takes two run folders"),
        (["a", "b", "-o", "x.txt"], USAGE, "must end in .png, .pdf, .svg or .html"),
        (["a", "b", "-o", "no/x.png"], USAGE, "there is no folder no"),
        (["a", "none"], USAGE, "can't read none: it has no config.yaml"),
    ],
)
def test_what_it_cannot_do_is_said_in_a_line(
    two: Path, capsys: Capture, words: list[str], status: int, said: str
) -> None:
    assert main(["compare", *words]) == status
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert sorted(os.listdir(two)) == ["a", "b"]
