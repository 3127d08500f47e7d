"""What benchmarks leave: their numbers as JSON, with what someone would need to know to measure them again."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from fl_sim.folder import provenance


def store(output: Path | None, **content: Any) -> None:
    """Write the numbers and their provenance, if a file was asked for."""
    if output is not None:
        about = provenance("cpu", {}, sys.argv) | {"cores": os.cpu_count(), "load_after": os.getloadavg()}
        output.write_text(json.dumps({"about": about} | content, indent=2) + "\n")
