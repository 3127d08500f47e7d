"""The packages that trackers write with: extras, imported only when a run asks for them."""

from __future__ import annotations

import importlib.util

from fl_sim.errors import ConfigError


def check_installed(package: str) -> None:
    """Whether a tracker's package, after which its extra is named, can be imported."""
    spec = importlib.util.find_spec(package)
    # A folder of that name (wandb makes some) is found, too, but has no file to import.
    if spec is None or spec.origin is None:
        raise ConfigError("", package, f'needs {package}, which is not installed: pip install "fl-sim[{package}]"')
