"""What every test shares: one torch thread, quiet libraries, and a working folder of its own where it asks for one."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

# matplotlib would otherwise complain of an unwritable home or build its font cache anew for each test process.
os.environ.setdefault("MPLCONFIGDIR", str(Path(tempfile.gettempdir()) / f"fl-sim-tests-{os.getuid()}"))

import fl_sim  # noqa: F401  (switches Flower's telemetry off before Flower is imported)

with warnings.catch_warnings():
    # Warnings of our own are errors; those that Flower's dependencies make of each other on import are not ours.
    warnings.simplefilter("ignore")
    import flwr.app
    import flwr.clientapp
    import flwr.serverapp  # noqa: F401

import tiny

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's pictures are empty files: drawing takes longer than a tiny run. Tests that look at them are `drawn`."""
    if request.node.get_closest_marker("drawn") is None:
        tiny.draw_nothing(monkeypatch)


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder: whatever a command leaves behind is found here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
