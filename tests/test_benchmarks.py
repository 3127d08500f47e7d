"""The benchmarks run to their end, cut down: what they measure here says nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "key"),
    [
        ("gpu.py", ["--small", "--rounds", "1"], "cases"),
        ("evaluation.py", ["--repeats", "2"], "cases"),
        ("scaling.py", ["population", "--most", "100"], "tables"),
        ("aggregators.py", ["mean", "--model", "cnn", "--clients", "4"], "rules"),
    ],
)
def test_a_benchmark_runs_and_stores(script: str, words: list[str], key: str, tmp_path: Path) -> None:
    """With its numbers and what it was measured on."""
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / script), *words, "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    stored = json.loads(out.read_text())
    assert stored[key]
    assert stored["about"]["packages"]["torch"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "module"),
    [
        pytest.param("tutorial_flower", "flwr_datasets", marks=pytest.mark.ray),
        ("pfl", "pfl"),
        ("fluke", "fluke"),
        ("fedlab", "fedlab"),
        ("blazefl", "blazefl"),
    ],
)
def test_another_simulator_does_the_same_work(way: str, module: str, tmp_path: Path) -> None:
    """As many steps on as many samples, to the same loss: with one batch a client, order changes nothing."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed (the extra `bench`)")
    out = tmp_path / "out.json"
    words = ["digits", "--check", "--rounds", "1", "--ways", "inprocess_1", way, "-o", str(out)]
    command = [sys.executable, str(BENCHMARKS / "others.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["cases"]["digits"]
    ours, theirs = found["inprocess_1"], found[way]
    assert (theirs["steps"], theirs["samples"]) == (ours["steps"], ours["samples"])
    # Not all weigh clients of 12 and of 13 samples by their numbers.
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)


@pytest.mark.slow
def test_simulators_are_measured_beside_fl_sim(tmp_path: Path) -> None:
    """With their versions; what is not installed is said."""
    out = tmp_path / "out.json"
    other = "fluke" if importlib.util.find_spec("fluke") else "bare"
    words = ["digits", "--rounds", "1", "--repeats", "1", "--ways", "inprocess_1", other, "-o", str(out)]
    command = [sys.executable, str(BENCHMARKS / "others.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for module, way in (("pfl", "pfl"), ("fluke", "fluke")):
        assert (f"{way}: left out" in done.stdout) == (importlib.util.find_spec(module) is None)
    stored = json.loads(out.read_text())
    assert stored["cases"]["digits"]["ways"][other]["seconds"] > 0
    assert set(stored["versions"]) >= {"pfl", "fluke-fl", "ray"}
