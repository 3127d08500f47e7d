"""What a round costs by the number of clients, by the model's size and by how many rounds came before it.

    python benchmarks/scaling.py                                  # everything; a few minutes on two cores
    python benchmarks/scaling.py population --most 10000 -o scaling.json

Each case is one `fl-sim run` in a fresh process: the median of its rounds' seconds but the first, and the most memory
that it held. Within a table only what the table is about changes:

population   10 of 100 to 100,000 clients a round, 4 samples each: a round should cost the same, and memory should grow
             by the data alone
cohort       10 to 1,000 of 1,000 clients a round: seconds a client should stay the same
model        5 clients a round, a wide ResNet of 0.2 to 25 million parameters on 8×8 images
rounds       500 rounds: the last hundred beside the first
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from storing import count, json_file, store

QUIET = ["attack=none", "eraser=none", "erasing=never", "eval.every=1000", "checkpoint.every=1000", "data=synthetic"]
SMALL = ["data.image_size=8", "data.channels=1", "data.test_samples=100", "data.augment.crop=0", "partition=iid"]
THREADS = ["engine.workers=1", "engine.server_threads=1"]
COHORTS = (10, 100, 1000)
POPULATIONS = (100, 1000, 10_000, 100_000)
WIDTHS = (1, 4, 12)


def run(*overrides: str) -> dict[str, float]:
    """Seconds a round and the most memory of one run, and the seconds of its first and last hundred rounds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fl_sim.cli", "run", *QUIET, *SMALL, *THREADS, *overrides, f"output={folder}"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            complaint = process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(overrides)} failed:\n{complaint}")
        metrics = next(Path(folder).rglob("metrics.jsonl")).read_text().splitlines()
    events = [json.loads(line) for line in metrics]
    seconds = [event["seconds"] for event in events if event["event"] == "round"]
    return {
        "seconds_a_round": statistics.median(seconds[1:-1]),  # the first warms up, the last evaluates
        "first_hundred": statistics.median(seconds[1:101]),
        "last_hundred": statistics.median(seconds[-101:-1]),
        "peak_mib": usage.ru_maxrss / 1024,
    }


def show(label: str, found: dict[str, float], least: dict[str, float], share: float = 1.0) -> None:
    """One line; ratios to the table's first row, of seconds for each unit of `share`."""
    ratio = found["seconds_a_round"] / least["seconds_a_round"] / share
    print(
        f"  {label:28s} {1000 * found['seconds_a_round']:9.1f} ms a round {ratio:6.2f}   {found['peak_mib']:7.0f} MiB",
        flush=True,
    )


def population(most: int) -> list[dict[str, Any]]:
    print("population: 10 clients a round, 4 samples each; ratio of seconds a round")
    rows: list[dict[str, Any]] = []
    for clients in (each for each in POPULATIONS if each <= most):
        # A twentieth of the samples waits at the server.
        data = [f"data.samples={round(4 * clients / 0.95) + 1}", f"clients={clients}", "clients_per_round=10"]
        rows.append({"clients": clients} | run(*data, "rounds=30"))
        show(f"{clients} clients", rows[-1], rows[0])
    return rows


def cohort(most: int) -> list[dict[str, Any]]:
    print("cohort: of 1,000 clients with 16 samples each; ratio of seconds a client")
    rows: list[dict[str, Any]] = []
    for clients in (each for each in COHORTS if each <= most):
        drawn = ["data.samples=17000", "clients=1000", f"clients_per_round={clients}"]
        rows.append({"clients_a_round": clients} | run(*drawn, f"rounds={5 if clients > 100 else 20}"))
        show(f"{clients} clients a round", rows[-1], rows[0], clients / COHORTS[0])
    return rows


def model() -> list[dict[str, Any]]:
    print("model: 5 clients a round, 8 samples each; ratio of seconds a parameter")
    rows: list[dict[str, Any]] = []
    for width in WIDTHS:
        network = ["model=wrn_16_1", f"model.widen={width}", "data.channels=3"]
        rows.append(
            {"parameters": parameters(width)}
            | run(*network, "data.samples=90", "clients=10", "clients_per_round=5", "rounds=6")
        )
        millions = rows[-1]["parameters"] / 1e6
        show(f"{millions:.1f}M parameters", rows[-1], rows[0], rows[-1]["parameters"] / rows[0]["parameters"])
    return rows


def parameters(width: int) -> int:
    from fl_sim.models.wide_resnet import WideResNet

    body, _ = WideResNet(depth=16, widen=width).body((3, 8, 8), 10)
    return sum(each.numel() for each in body.parameters())


def rounds() -> list[dict[str, Any]]:
    print("rounds: 10 clients a round; the median of the last hundred rounds over that of the first")
    found = run("data.samples=850", "clients=20", "clients_per_round=10", "rounds=500")
    print(f"  {'500 rounds':28s} {found['last_hundred'] / found['first_hundred']:23.2f}   {found['peak_mib']:7.0f} MiB")
    return [{"rounds": 500} | found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"population": population, "cohort": cohort, "model": model, "rounds": rounds}
    parser.add_argument("tables", nargs="*", choices=[*tables, []], help="default: all")
    parser.add_argument("--most", type=count, default=100_000, help="leaves larger populations and cohorts out")
    parser.add_argument("-o", "--output", type=json_file, help="a JSON file")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    result = {
        name: tables[name](chosen.most) if name in ("population", "cohort") else tables[name]()  # type: ignore[operator]
        for name in chosen.tables or tables
    }
    store(chosen.output, tables=result)


if __name__ == "__main__":
    main()
