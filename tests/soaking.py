"""A long run of tiny clients: do memory, time, open files, threads, shared memory and temporary files stay as they are?

`python tests/soaking.py ROUNDS FOLDER` prints the medians of the first and of the last hundred rounds as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (quiet libraries, one thread)

from fl_sim import execution
from fl_sim.build import compose_config
from fl_sim.rounds import Federation

WORDS = (
    *("data=digits", "model.width=4", "clients=30", "clients_per_round=3", "client.epochs=1", "engine.workers=1"),
    *("client=fed_nad", "client.lr=0.01", "attack=data_poisoning", "aggregator=fldetector", "eval.every=10"),
    *("server_optimizer=momentum", "eraser=fine_tune", "eraser.epochs=1", "eraser.min_steps=4", "erasing.rounds=100"),
)
"""Everything that could pile up: clients' teachers in files, a rule's history, a server's momentum, erasings."""


def used() -> dict[str, int]:
    """What this process, and what it leaves lying about, take up now."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "resident_bytes": resident,
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "shared_memory_files": len(os.listdir("/dev/shm")),
        "temporary_files": len(os.listdir(tempfile.gettempdir())),
    }


def soaked(rounds: int, folder: Path, window: int = 100) -> dict[str, Any]:
    """A run of so many rounds in a fresh folder; the medians of its first and its last hundred."""
    folder.mkdir(parents=True)
    before = tempfile.tempdir
    tempfile.tempdir = str(folder.parent / "temporary")
    Path(tempfile.tempdir).mkdir()
    seen: list[dict[str, float]] = []
    original = Federation._round

    def measured(self: Federation, t: int) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        original(self, t)
        seen.append({"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu} | used())

    Federation._round = measured  # type: ignore[method-assign]
    try:
        execution.start(compose_config([*WORDS, f"rounds={rounds}"]), folder, ["fl-sim", "run"])
    finally:
        Federation._round = original  # type: ignore[method-assign]
        tempfile.tempdir = before
    windows = {"first": seen[1 : window + 1], "last": seen[-window:]}
    medians = {
        name: {key: statistics.median(each[key] for each in part) for key in seen[0]} for name, part in windows.items()
    }
    files = sum(1 for path in folder.rglob("*") if path.is_file())
    return {"rounds": len(seen), **medians, "files_in_the_run_folder": files}


if __name__ == "__main__":
    print(json.dumps(soaked(int(sys.argv[1]), Path(sys.argv[2]) / "run"), indent=1))
