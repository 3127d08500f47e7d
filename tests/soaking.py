"""A long run of tiny clients: do memory, time, open files, threads, shared memory and temporary files stay as they are?

`python tests/soaking.py ROUNDS FOLDER [WORDS...]` prints the medians of the first and of the last hundred rounds as
JSON, and what is left after the run that was not there before it; `WORDS` are `engine=ray` and the like.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (quiet libraries, one thread)

from fl_sim import execution
from fl_sim.composing import compose_config
from fl_sim.folder import made
from fl_sim.rounds import Federation

WORDS = (
    *("data=digits", "model.width=4", "clients=30", "clients_per_round=3", "client.epochs=1", "engine.workers=1"),
    *("client=fed_nad", "client.lr=0.01", "attack=data_poisoning", "aggregator=fldetector", "eval.every=10"),
    *("server_optimizer=momentum", "eraser=fine_tune", "eraser.epochs=1", "eraser.min_steps=4", "erasing.rounds=100"),
)
"""Everything that could pile up: clients' teachers in files, a rule's history, a server's momentum, erasings."""

LEFT = ("processes", "open_files", "threads", "shared_memory_files", "temporary_files")
"""Of which there may be no more after a run than before it."""


def used() -> dict[str, int]:
    """What this process, those that it has started, and what they leave lying about, take up now."""
    others = started()
    return {
        "own_bytes": resident_bytes("self"),
        "shared_bytes": resident_bytes("self", "RssShmem"),
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "processes": len(others),
        "their_own_bytes": sum(resident_bytes(each) for each in others),
        "their_open_files": sum(len(os.listdir(f"/proc/{each}/fd")) for each in others),
        "shared_memory_files": len(os.listdir("/dev/shm")),
        "temporary_files": sum(1 for _ in Path(tempfile.gettempdir()).rglob("*")),
    }


def resident_bytes(process: str, kind: str = "RssAnon") -> int:
    """A process's own memory; `RssShmem`: what it has touched of memory that it shares, such as Ray's object store."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) << 10


def started() -> list[str]:
    """The processes that this one has started, and those that they have."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z":  # one that has ended and that nobody has waited for takes up nothing
            parents[path.parent.name] = parent
    found = [str(os.getpid())]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def soaked(rounds: int, folder: Path, window: int = 100, words: Sequence[str] = ()) -> dict[str, Any]:
    """A run of so many rounds in a fresh folder; the medians of its first and its last hundred."""
    folder.mkdir(parents=True)
    before = tempfile.tempdir
    tempfile.tempdir = tempfile.mkdtemp(prefix="soak-")  # a short name, because Ray has sockets in it
    # What libraries load and open once, with the first erasing at the latest, is there before the run that counts.
    warm = compose_config([*WORDS, *words, "rounds=1", "erasing.rounds=1"])
    execution.start(warm, made(folder.parent / "warm"), ["fl-sim", "run"])
    beginning = used()
    seen: list[dict[str, float]] = []
    original = Federation._round

    def measured(self: Federation, t: int) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        original(self, t)
        seen.append({"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu} | used())

    Federation._round = measured  # type: ignore[method-assign]
    try:
        execution.start(compose_config([*WORDS, f"rounds={rounds}", *words]), folder, ["fl-sim", "run"])
    finally:
        Federation._round = original  # type: ignore[method-assign]
        end = used()
        shutil.rmtree(tempfile.tempdir)
        tempfile.tempdir = before
    windows = {"first": seen[1 : window + 1], "last": seen[-window:]}
    medians = {
        name: {key: statistics.median(each[key] for each in part) for key in seen[0]} for name, part in windows.items()
    }
    files = sum(1 for path in folder.rglob("*") if path.is_file())
    left = {key: end[key] - beginning[key] for key in LEFT}
    return {"rounds": len(seen), **medians, "left": left, "files_in_the_run_folder": files}


if __name__ == "__main__":
    print(json.dumps(soaked(int(sys.argv[1]), Path(sys.argv[2]) / "run", words=sys.argv[3:]), indent=1))
