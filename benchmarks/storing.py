"""What benchmarks leave: their numbers as JSON, with what someone would need to know to measure them again."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from fl_sim.folder import provenance


def count(text: str) -> int:
    """A number of rounds and the like, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1 on")
    return int(text)


def json_file(text: str) -> Path:
    """A file for the numbers: that it can be written is looked at before anything is measured."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: can't be written")
    return path


def store(output: Path | None, **content: Any) -> None:
    """Write the numbers and their provenance, if a file was asked for."""
    if output is not None:
        about = provenance("cpu", {}, sys.argv) | {"cores": os.cpu_count(), "load_after": os.getloadavg()}
        output.write_text(json.dumps({"about": about} | content, indent=2) + "\n")
