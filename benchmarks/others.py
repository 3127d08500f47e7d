"""How long a round takes other federated-learning simulators: the same federated averaging as fl-sim does.

    python benchmarks/others.py                          # both cases, everything that is installed, one worker each
    python benchmarks/others.py digits --workers 2 --repeats 3 -o others.json
    python benchmarks/others.py --check                  # steps, samples and the loss reached by each, unmeasured

`pip install -e ".[bench]"` brings those that run on this Python. Each way runs in a fresh process, interleaved. Each
simulator's own round loop runs, as its documentation has it written; how each differs stands in its file. pfl, fluke
and FedLab train one client after another in one process whatever the number of workers: compare their CPU seconds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import engines
from storing import count, json_file, store

OURS = {
    "bare": (),
    "inprocess_1": ("engine=inprocess", "engine.workers=1"),
    "inprocess_2": ("engine=inprocess", "engine.workers=2"),
    "batched": ("engine=batched",),
}
OTHERS = {
    "stock_flower": ("stock_flower", ("flwr", "ray")),
    "tutorial_flower": ("tutorial_flower", ("flwr", "ray", "flwr_datasets")),
    "pfl": ("pfl_research", ("pfl",)),
    "fluke": ("fluke_fl", ("fluke",)),
    "fedlab": ("fedlab_standalone", ("fedlab",)),
    "blazefl": ("blaze_fl", ("blazefl", "tqdm")),
}
"""The file here, and the modules that it needs."""
PACKAGES = ("ray", "flwr-datasets", "datasets", "pfl", "fluke-fl", "fedlab", "blazefl")


def executed(way: str, config: dict[str, Any]) -> list[engines.Clocks]:
    """The clocks at the end of each round of one way."""
    if way == "bare":
        return engines.bare(config)
    if way in OURS:
        return engines.simulated(config)
    if way == "stock_flower":
        import stock_flower
        from tutorial_flower import federate

        federate(stock_flower.server_app, stock_flower.client_app, config)
        return stock_flower.ended
    ended: list[engines.Clocks] = importlib.import_module(OTHERS[way][0]).rounds(config)
    return ended


def one_way(way: str, case: str, rounds: int, workers: int, started: float) -> None:
    """Print, as JSON, when the first round ended and how long the others took."""
    from fl_sim.composing import compose_config

    # One round more than asked for: fl-sim's last one evaluates and saves.
    overrides = [*engines.CASES[case], f"engine.workers={workers}", *OURS.get(way, ()), f"rounds={rounds + 2}"]
    config = compose_config(overrides)
    if "FL_SIM_COUNT" in os.environ and way in OURS:
        _tell_rounds(config)
    ended = executed(way, config)
    pairs = list(itertools.pairwise(ended[:-1]))
    seconds = [after.ended - before.begins for before, after in pairs]
    cpu = [after.ended_cpu - before.begins_cpu for before, after in pairs]
    found = {"first": ended[0].ended - started, "seconds": statistics.median(seconds), "cpu": sum(cpu) / len(cpu)}
    print(json.dumps(found | {"memory": ended[-1].memory}))


def _tell_rounds(config: dict[str, Any]) -> None:
    """Have fl-sim's own rounds tell their model, as the others do."""
    from same_work import Rounds, Work

    from fl_sim.rounds import Federation

    original, rounds = Federation._round, Rounds(Work.of(config))

    def told(self: Federation, t: int) -> None:
        original(self, t)
        rounds.note(self._model.state_dict())

    Federation._round = told  # type: ignore[method-assign]


def measured(way: str, case: str, rounds: int, workers: int, count: Path | None = None) -> dict[str, float]:
    """One way's numbers, from a fresh process; None for `count` leaves the counting out."""
    command = [sys.executable, __file__, case, "--way", way, "--rounds", str(rounds), "--workers", str(workers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"FL_SIM_COUNT": str(count)} if count else {})
    done = subprocess.run([*command, "--started", repr(time.time())], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way} on {case} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(case: str, ways: list[str], rounds: int, repeats: int, workers: int) -> dict[str, Any]:
    """Medians over the repetitions; a ratio is the median of the repetitions' own ratios to fl-sim's on one core."""
    runs: list[dict[str, dict[str, float]]] = []
    for repeat in range(repeats):
        runs.append({})
        for way in ways:
            runs[-1][way] = found = measured(way, case, rounds, workers)
            line = f"{found['seconds']:8.3f} s a round  {found['cpu']:8.3f} CPU s  {found['memory']:6.0f} MiB"
            line += f"  first round after {found['first']:5.1f} s"
            print(f"{case:7s} {repeat + 1}/{repeats} {way:16s}{line}", flush=True)
    table = {way: {key: statistics.median(run[way][key] for run in runs) for key in runs[0][way]} for way in ways}
    bases = [way for way in ("inprocess_1", "inprocess_2", "batched") if way in ways]
    ratios = {
        f"{way} / {base}": {
            key: statistics.median(run[way][key] / run[base][key] for run in runs) for key in ("seconds", "cpu")
        }
        for way, base in itertools.product(ways, bases)
        if way in OTHERS
    }
    for name, ratio in ratios.items():
        print(f"{case:7s} {name:30s} {ratio['seconds']:7.2f} (CPU {ratio['cpu']:.2f})", flush=True)
    return {"ways": table, "ratios": ratios, "rounds": rounds, "overrides": list(engines.CASES[case]), "runs": runs}


def check(case: str, ways: list[str], rounds: int, workers: int) -> dict[str, Any]:
    """What each way trained on in a round, and what loss it came to: those whose passes can be counted."""
    from same_work import counted

    found = {}
    for way in ways:
        if way in ("bare", "stock_flower", "batched"):  # no rounds told, or no passes of single clients
            continue
        with tempfile.TemporaryDirectory() as folder:
            measured(way, case, rounds, workers, Path(folder) / "count")
            found[way] = each = counted(Path(folder) / "count")
        line = f"{each['steps']:8.2f} steps and {each['samples']:9.2f} samples a round, loss {each['loss']:.4f}"
        print(f"{case:7s} {way:16s}{line}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", choices=[*engines.CASES, []], help="default: all")
    parser.add_argument("--ways", nargs="+", choices=[*OURS, *OTHERS], help="default: all that is installed")
    parser.add_argument("--workers", type=count, default=1, help="of what has workers: Flower, BlazeFL, batched")
    parser.add_argument("--rounds", type=count, help="measured rounds after the first")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--check", action="store_true", help="count steps and samples instead of measuring")
    parser.add_argument("-o", "--output", type=json_file, help="a JSON file")
    parser.add_argument("--way", choices=[*OURS, *OTHERS], help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.way:
        one_way(chosen.way, chosen.cases[0], chosen.rounds, chosen.workers, chosen.started)
        return
    ways = [way for way in OURS if way != "inprocess_2" or chosen.workers > 1]
    for way, (_, needed) in OTHERS.items():
        if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
            print(f"{way}: left out, {', '.join(missing)} not installed")
        else:
            ways.append(way)
    ways = chosen.ways or ways
    load, found = os.getloadavg(), {}
    for case in chosen.cases or list(engines.CASES):
        rounds = chosen.rounds or engines.ROUNDS[case]
        found[case] = (
            check(case, ways, rounds, chosen.workers)
            if chosen.check
            else compare(case, ways, rounds, chosen.repeats, chosen.workers)
        )
    versions = {name: _version(name) for name in PACKAGES}
    options = {"repeats": chosen.repeats, "workers": chosen.workers, "threads_a_process": 1, "load_before": load}
    store(chosen.output, cases=found, versions=versions, affinity=sorted(os.sched_getaffinity(0)), **options)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
