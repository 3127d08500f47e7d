"""The tables of central_cifar10.md, from the folders of its runs.

    python docs/results/central_cifar10.py FOLDER...           # every finished `fl-sim central` run below them
    python docs/results/central_cifar10.py --clean FOLDER...   # what a clean model makes of each run's stamped images

A cell is ACC / ASR in percent, the mean over the seeds that there are; ± is half the distance between the lowest and
the highest, and the number of seeds stands in brackets where it is not one.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from fl_sim.build import to_text, world_of
from fl_sim.central import Both, cached_clean, cached_victim, planned, victims_of
from fl_sim.metrics import evaluate

TRIGGERS = ("badnets", "trojan", "blend", "cl", "sig", "refool")

Cell = tuple[str, str]
Scores = dict[Cell, list[tuple[float, float]]]


def measured(folders: Iterable[Path]) -> tuple[Scores, dict[Cell, list[float]]]:
    """(ACC, ASR) and seconds by (trigger, method): the victim of a client, and each eraser that was tried on it."""
    scores, seconds = defaultdict[Cell, list[tuple[float, float]]](list), defaultdict[Cell, list[float]](list)
    seen = set[tuple[str, str, int]]()  # runs with other erasers share a seed's victim
    for done in sorted(path for folder in folders for path in folder.rglob("done")):
        choices = yaml.safe_load((done.parent / "config.yaml").read_text())["choices"]
        summary = json.loads((done.parent / "summary.json").read_text())
        if "erasers" not in summary:
            continue
        of_victim = "victim" if choices["client"] == "sgd" else choices["client"]
        for result in [summary | {"eraser": of_victim}, *summary["erasers"]]:
            key = choices["trigger"], result["eraser"], summary["seed"]
            if result["acc"] is not None and key not in seen:
                seen.add(key)
                scores[choices["trigger"], result["eraser"]].append((result["acc"], result["asr"]))
                seconds[choices["trigger"], result["eraser"]].append(result["seconds"])
    return scores, seconds


def percent(values: Sequence[float]) -> str:
    """78.1 of one, 78.1 ± 0.4 of several."""
    middle = f"{100 * sum(values) / len(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ± {50 * (max(values) - min(values)):.1f}"


def cell(values: Sequence[tuple[float, float]]) -> str:
    if not values:
        return "–"
    acc, asr = zip(*values, strict=True)
    return f"{percent(acc)} / {percent(asr)}" + (f" ({len(values)})" if len(values) > 1 else "")


def show(scores: Scores, seconds: dict[Cell, list[float]]) -> None:
    methods = list(dict.fromkeys(method for _, method in scores))
    print(f"| | {' | '.join(TRIGGERS)} | s |\n|{'---|' * (len(TRIGGERS) + 2)}")
    for method in methods:
        cells = [cell(scores.get((trigger, method), [])) for trigger in TRIGGERS]
        took = [value for trigger in TRIGGERS for value in seconds.get((trigger, method), [])]
        print(f"| {method} | {' | '.join(cells)} | {sum(took) / max(len(took), 1):.0f} |")


def unpoisoned(folders: Iterable[Path]) -> None:
    """The floor of ASR: how often a model that was trained alike on clean data answers the target class."""
    for done in sorted(path for folder in folders for path in folder.rglob("done")):
        config = yaml.safe_load((done.parent / "config.yaml").read_text())
        world = world_of(to_text(config))
        (plan, named), victims = planned(config, world), victims_of(world.parts.settings)
        model, _ = cached_clean(world, plan, named, victims)
        backdoor = world.backdoor
        if backdoor.needs_workshop:  # the trigger as its victim has it
            backdoor = backdoor.recalling(cached_victim(world, plan, Both(), named, victims).record)
        score = evaluate(model.eval(), world.test, backdoor)
        name = f"{config['choices']['trigger']}, seed {config['seed']}"
        print(f"{name}: ACC {score.acc:.3f}, ASR {score.asr:.3f}, RA {score.ra:.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--clean", action="store_true")
    chosen = parser.parse_args()
    if chosen.clean:
        unpoisoned(chosen.folders)
    else:
        show(*measured(chosen.folders))
