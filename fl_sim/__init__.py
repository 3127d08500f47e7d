"""fl-sim: backdoor attacks and defenses in federated learning, simulated."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

__version__ = "0.1.0"

# Flower, Ray, MLflow, Weights & Biases and OpenMP read these when they are imported: no telemetry, no look-up of newer
# releases, no environment built behind the user's back. A user who sets one of them keeps that setting.
for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    # Read by OpenMP when torch is imported: idle threads sleep instead of spinning on the cores that clients train on.
    "OMP_WAIT_POLICY": "passive",
}.items():
    os.environ.setdefault(_name, _value)


def load_runs(*folders: str | os.PathLike[str], events: str = "run") -> pandas.DataFrame:
    """The runs in the folders, and anywhere below them, as a pandas data frame.

    `events="run"`: a row for each run, with its configuration (`attack`, `eraser`, `eraser.lr`, ...) and what it came
    to (`acc`, `asr`, `asr_late`, ...); centralized runs have one for their victim and one for each eraser.
    `events="round"`, `"erase"` or another event of `metrics.jsonl`: a row for each of these events, with all its
    fields, the run's choices and the keys that vary. What can't be read is left out with a warning.
    """
    from fl_sim.report.frame import frame

    return frame(folders, events)
