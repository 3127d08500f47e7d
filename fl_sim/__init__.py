"""fl-sim: backdoor attacks and defenses in federated learning, simulated."""

import os

__version__ = "0.1.0"

# Flower, Ray and OpenMP read these when they are imported: no telemetry, no look-up of newer releases, no environment
# built behind the user's back. A user who sets one of them keeps that setting.
for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Read by OpenMP when torch is imported: idle threads sleep instead of spinning on the cores that clients train on.
    "OMP_WAIT_POLICY": "passive",
}.items():
    os.environ.setdefault(_name, _value)
