"""When training clients together pays: rounds under `engine=batched` against rounds under `engine=inprocess`.

    python benchmarks/batched.py                              # all cases
    python benchmarks/batched.py digits --repeats 5 -o batched.json

Runs are interleaved, so that what else the machine does meets all alike. The first round of each, in which `auto`
measures, is left out. Wall seconds are what users wait for; CPU seconds hardly depend on what
else is running. Ratios are those of the medians, above 1 where batched is faster.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from contextlib import redirect_stdout
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from storing import count, json_file

from fl_sim import execution
from fl_sim.composing import compose_config
from fl_sim.rounds import Federation

COMMON = ("attack=none", "eraser=none", "eval.every=1000", "checkpoint.every=1000")
SYNTHETIC = ("data=synthetic", "data.image_size=32", "data.test_samples=100", "data.clean_fraction=0", "partition=iid")
MANY = ("data=digits", "clients=100", "clients_per_round=100")
TEN = ("data.samples=1000", "clients=10", "clients_per_round=10", "client.epochs=1")
CASES: dict[str, tuple[str, ...]] = {
    "digits": (*COMMON, *MANY, "partition=iid"),
    "digits_uneven": (*COMMON, *MANY, "partition=dirichlet", "partition.alpha=1", "partition.min_samples=1"),
    "cnn32": (*COMMON, *SYNTHETIC, *TEN),
    "wrn": (*COMMON, *SYNTHETIC, *TEN, "model=wrn_16_1"),
}
"""100 clients of 16 digits each, or of uneven numbers; 10 clients of 100 32×32 images, small CNN and WRN-16-1."""
WAYS = {
    "inprocess": (),
    "stacks_of_5": ("engine=batched", "engine.clients=5"),
    "stacks_of_25": ("engine=batched", "engine.clients=25"),
    "auto": ("engine=batched",),
}


def rounds_of(case: str, way: str, rounds: int) -> dict[str, Any]:
    """One run: the median round's wall and CPU seconds."""
    clocks = []
    original = Federation._round

    def timed(self: Federation, t: int) -> None:
        started = time.perf_counter(), time.process_time()
        original(self, t)
        clocks.append((time.perf_counter() - started[0], time.process_time() - started[1]))

    Federation._round = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        overrides = [*CASES[case], *WAYS[way], f"rounds={rounds + 1}"]
        execution.start(compose_config(overrides), Path(folder), ["fl-sim", "run", *overrides])
        meta = json.loads((Path(folder) / "meta.json").read_text())
        events = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    Federation._round = original  # type: ignore[method-assign]
    wall, cpu = (statistics.median(column) for column in zip(*clocks[1:], strict=True))
    batched = [event.get("batched", 0) for event in events if event["event"] == "round"]
    return {"wall": wall, "cpu": cpu, "batched": batched[-1], "choices": list(meta.get("batched", {}).values())}


def provenance() -> dict[str, Any]:
    """What someone would need to know to measure this again."""
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    return {
        "packages": {name: importlib.metadata.version(name) for name in ("fl-sim", "torch", "flwr")},
        "python": platform.python_version(),
        "commit": subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=count, default=4, help="rounds a run, besides the first")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("-o", "--output", type=json_file)
    options = parser.parse_args()
    options.cases = options.cases or list(CASES)
    torch.set_num_threads(1)
    about = provenance()
    runs: list[dict[str, Any]] = []
    for _, case, way in itertools.product(range(options.repeats), options.cases, WAYS):
        runs.append({"case": case, "way": way} | rounds_of(case, way, options.rounds))
        print(f"{case:14} {way:13} {runs[-1]['wall']:8.3f} s  {runs[-1]['cpu']:8.3f} s CPU", flush=True)
    ratios: dict[str, dict[str, float]] = {}
    for case, clock in itertools.product(options.cases, ("wall", "cpu")):
        medians = {w: statistics.median(r[clock] for r in runs if (r["case"], r["way"]) == (case, w)) for w in WAYS}
        ratios[f"{case}, {clock}"] = {way: round(medians["inprocess"] / medians[way], 2) for way in WAYS}
    for name, row in ratios.items():
        print(f"{name:20}", "  ".join(f"{way} {ratio:.2f}" for way, ratio in row.items()))
    if options.output:
        report = {"provenance": about, "cases": CASES, "ways": WAYS, "ratios": ratios, "runs": runs}
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
