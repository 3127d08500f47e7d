"""The benchmarks run to their end, cut down: what they measure here says nothing."""

from __future__ import annotations

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
