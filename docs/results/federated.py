"""Erasing in a federation, curve by curve beside its controls: which eraser, when, how often, at what cost.

    python docs/results/federated.py run [--seeds 0,1] [--rows "nad;pbe"] [OVERRIDE ...]   # runs/sweeps/federated/*
    python docs/results/federated.py table runs/sweeps/federated              # prints the table of federated.md
    python docs/results/federated.py picture runs/sweeps/federated OUT.png
    python docs/results/federated.py cost [OVERRIDE ...]      # processor seconds of one erasing, and of one client
    python docs/results/federated.py clients FOLDER           # what honest clients make of a fed_nad run's last model

`run` can be stopped and started again: finished runs are found. Runs of a seed share data, clients and cohorts.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from attack_curves import points
from tables import Finished, comebacks, finished, interval, make, mean

from clients.local.fed_nad import FedNad
from fl_sim.build import to_text, world_of
from fl_sim.central import server_context
from fl_sim.composing import compose_config
from fl_sim.metrics import Score, evaluate
from fl_sim.protocols import ClientContext, State
from fl_sim.randomness import generator
from fl_sim.summary import ACC_COLOUR, ASR_COLOUR
from fl_sim.training import fit
from fl_sim.world import World

SETTING = [
    *("experiment=fashion_small", "data.image_size=14", "data.subset=0.1", "rounds=20"),
    *("engine.workers=1", "engine.server_threads=1"),
]
"""Fashion-MNIST at half its size and a tenth of its images; the default CNN, attack and trigger of the preset."""
ATTACK = ["attack.epochs=5"]
"""So that an attacker takes half as many steps a round as with all images: nearer to the preset's strength."""
NONE = ["eraser=none"]
NAD, PBE_CLEAN, PBE = ([f"eraser={name}", "eraser.min_steps=100"] for name in ("nad", "pbe_clean", "pbe"))
FINE_TUNE = ["eraser=fine_tune", "eraser.min_steps=200"]
"""A quarter of the steps that the erasers' defaults take, all in proportion: NAD's ten epochs are 50 steps here."""
LATE = ["threat=window", "threat.first=11", "threat.last=20"]
"""An attack that begins when the federation has settled: `on_suspicion` takes one that is always there for usual."""
FED_NAD = ["client=fed_nad", "client.optimizer=sgd", *NONE]
"""With the preset's own rate and epochs for teacher and student, so that only the defense differs."""
ROWS: dict[str, list[str]] = {
    "no attack": ["attack=none", *NONE],
    "no defense": NONE,
    "fine_tune": [*FINE_TUNE, "erasing.rounds=5"],
    "nad": [*NAD, "erasing.rounds=5"],
    "pbe_clean": [*PBE_CLEAN, "erasing.rounds=5"],
    "pbe": [*PBE, "erasing.rounds=5"],
    "fed_nad": FED_NAD,
    "fed_nad, no attention": [*FED_NAD, "client.weights=[0]"],
    "nad at_end": [*NAD, "erasing=at_end"],
    "nad budget": [*NAD, "erasing=budget", "erasing.share=0.4"],
    "late: no defense": [*LATE, *NONE],
    "late: nad": [*LATE, *NAD, "erasing.rounds=5"],
    "late: nad on_suspicion": [*LATE, *NAD, "erasing=on_suspicion"],
    "nad, every 10": [*NAD, "erasing.rounds=10"],
    "nad, every 2": [*NAD, "erasing.rounds=2"],
    "nad, every 1": [*NAD, "erasing.rounds=1"],
    "pbe_clean, every 10": [*PBE_CLEAN, "erasing.rounds=10"],
    "pbe_clean, every 2": [*PBE_CLEAN, "erasing.rounds=2"],
    "pbe_clean, every 1": [*PBE_CLEAN, "erasing.rounds=1"],
    "pbe, every 10": [*PBE, "erasing.rounds=10"],
    "pbe, every 2": [*PBE, "erasing.rounds=2"],
    "pbe, every 1": [*PBE, "erasing.rounds=1"],
}
LAST = 7
"""The last third of the rounds."""


def words_of(name: str) -> list[str]:
    """All overrides of a row but its seed."""
    words = ROWS[name]
    return [*SETTING, *words] if "attack=none" in words else [*SETTING, *ATTACK, *words]


def row_of(run: Finished) -> str:
    """Which row a finished run belongs to."""
    config, chosen = run.config, run.choices
    late = "late: " if chosen["threat"] == "window" else ""
    if chosen["client"] == "fed_nad":
        return "fed_nad" if any(config["client"]["weights"]) else "fed_nad, no attention"
    if chosen["eraser"] == "none":
        return "no attack" if chosen["attack"] == "none" else f"{late}no defense"
    if chosen["erasing"] != "every":
        return f"{late}{chosen['eraser']} {chosen['erasing']}"
    period = config["erasing"]["rounds"]
    return late + chosen["eraser"] + (f", every {period}" if period != 5 else "")


def rows_of(folder: Path) -> dict[str, list[Finished]]:
    """The finished runs of each row, by seed."""
    found: dict[str, list[Finished]] = defaultdict(list)
    for run in sorted(finished(folder), key=lambda run: int(run.config["seed"])):
        found[row_of(run)].append(run)
    return found


def averaged(runs: Sequence[Finished], key: str) -> float | None:
    """Of all erasings of all runs, as `erased` is of one."""
    return mean(run.erased(key) for run in runs)


def by_seed(values: Sequence[float | None]) -> str:
    """Each seed's value: an interval of two or three would say less."""
    return " / ".join("–" if value is None else f"{value:.2f}" for value in values)


def back(runs: Sequence[Finished]) -> str:
    """Of the erasings of a standing backdoor: how many it survived or outlived, how soon."""
    met, returned = comebacks(runs)
    if not met:
        return "–"
    return f"{len(returned)} of {met}" + (f", after {mean(iter(returned)):.1f}" if returned else "")


def line(name: str, runs: Sequence[Finished]) -> str:
    """One row of the table."""
    count = mean(float(len(run.summary["erasings"])) for run in runs)
    refused = sum(not erasing["accepted"] for run in runs for erasing in run.summary["erasings"])
    cells = [
        f"`{name}`",
        ", ".join(str(run.config["seed"]) for run in runs),
        by_seed([run.last("acc", LAST) for run in runs]),
        by_seed([run.last("asr", LAST) for run in runs]),
        "–",
        "–",
        "–",
        "–",
    ]
    if count:
        before, left = averaged(runs, "asr_before"), averaged(runs, "asr")
        cells[4] = f"{count:g}" + (f" ({refused} refused)" if refused else "")
        cells[5] = f"{before:.2f} → {left:.2f}"
        cells[6] = back(runs)
        cells[7] = f"{mean(run.summary['erasing_seconds'] / run.summary['seconds'] for run in runs):.0%}"
    return f"| {' | '.join(cells)} |"


def table(folder: Path) -> None:
    """One line a row: effect over the last third of the rounds, at its erasings, how long these last, their share."""
    found = rows_of(folder)
    print(
        f"| | seeds | ACC, last {LAST} rounds | ASR, last {LAST} rounds | erasings a run | ASR before → after", end=""
    )
    print(" | backdoor back | share of time |")
    print("|---" * 8 + "|")
    for name in ROWS:
        if name in found:
            print(line(name, found[name]))


def picture(folder: Path, target: Path) -> None:
    """A panel for each row: each seed's ACC and ASR, and in grey the ASR of the same seeds without a defense."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = rows_of(folder)
    names = [name for name in ROWS if name in found]
    columns = 4
    figure = Figure(figsize=(3.2 * columns, 2.2 * -(-len(names) // columns) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // columns), columns, number + 1)
        control = "late: no defense" if name.startswith("late") else "no defense"
        for runs, key, colour, width, words in (
            (found.get(control, []), "asr", "0.7", 1.0, "ASR, no defense"),
            (found[name], "acc", ACC_COLOUR, 1.4, "ACC"),
            (found[name], "asr", ASR_COLOUR, 1.4, "ASR"),
        ):
            for run, style in zip(runs, ("-", "--", ":"), strict=False):
                label = words if style == "-" else None
                axes.plot(*zip(*points(run.events, key), strict=True), style, color=colour, lw=width, label=label)
        axes.set_title(name, fontsize=9)
        axes.set_ylim(-0.03, 1.05)
        axes.set_xticks(range(0, 21, 5))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(target, dpi=90)


def seconds(work: Callable[[], Any]) -> float:
    """What the processor spent on it, whoever else kept it busy."""
    started = time.process_time()
    work()
    return time.process_time() - started


def context(world: World, client: int, received: torch.Tensor, private: State) -> ClientContext:
    """What an honest client knows, in a round that no run has."""
    return ClientContext(
        round=0,
        client=client,
        rng=generator(0, "federated.py", client),
        classes=world.parts.data.facts.classes,
        layout=world.layout,
        received=received,
        augment=world.parts.data.augment,
        fit=fit,
        private=private,
        threatening=None,
    )


def cost(extra: Sequence[str]) -> None:
    """Each eraser once on the untrained model, and client 0's update by each client; weights hardly change the time."""
    torch.set_num_threads(1)
    for words in (FINE_TUNE, NAD, PBE_CLEAN, PBE):
        world = world_of(to_text(compose_config([*SETTING, *extra, *words])))
        model, eraser = world.initial_model(), world.parts.eraser
        assert eraser is not None
        ctx = server_context(world, model, "cost", fit)
        print(f"{words[0]}: {seconds(lambda e=eraser, m=model, w=world, c=ctx: e.erase(m, w.clean, {}, c)):.1f} s")  # type: ignore[misc]
    for name, words in {"sgd": NONE, "fed_nad": FED_NAD}.items():
        world = world_of(to_text(compose_config([*SETTING, *extra, *words])))
        model, samples = world.initial_model(), world.samples_of(0)
        told = context(world, 0, world.layout.read(model), {})
        spent = seconds(lambda p=world.parts, m=model, s=samples, c=told: p.client.update(m, s, c))  # type: ignore[misc]
        print(f"client {name}: {spent / len(samples) * 1000:.2f} s for 1,000 samples")


def clients(folder: Path) -> None:
    """ACC and ASR of a fed_nad run's last global model, of its honest clients' teachers, and of what these would send
    next, with the attention term and without it."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    world = world_of(to_text(config))
    client, model = world.parts.client, world.new_model()
    assert isinstance(client, FedNad)
    model.load_state_dict(torch.load(folder / "model.pt"))
    received = world.layout.read(model)
    scores: dict[str, list[Score]] = defaultdict(list)

    def score(name: str, vector: torch.Tensor) -> None:
        world.layout.load(model, vector)
        scores[name].append(evaluate(model, world.test, world.backdoor))

    score("received", received)
    for path in sorted((folder / "clients").glob("*.pt")):
        number, private = int(path.name.split("_")[0]), torch.load(path)
        score("teacher", private["teacher"])
        for name, kind in {"sent": client, "sent, no attention": replace(client, weights=(0.0,))}.items():
            world.layout.load(model, received)
            told = context(world, number, received, private)
            score(name, received + kind.update(model, world.samples_of(number), told).delta)
    for name, found in scores.items():
        acc, asr = (interval([getattr(each, key) for each in found]) for key in ("acc", "asr"))
        print(f"{name}: {len(found)} models, ACC {acc}, ASR {asr}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["run", "table", "picture", "cost", "clients"])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--rows", default="", help="such as 'nad;pbe, every 2'; all by default")
    parser.add_argument("--name", default="federated")
    given = parser.parse_intermixed_args()
    if given.command == "run":
        wanted = [name for name in given.rows.split(";") if name] or list(ROWS)
        seeds = given.seeds.split(",")
        extra = [*given.words, f"name={given.name}"]
        make([[*words_of(name), *extra, f"seed={seed}"] for seed in seeds for name in wanted], 1)
    elif given.command == "table":
        table(Path(given.words[0]))
    elif given.command == "picture":
        picture(Path(given.words[0]), Path(given.words[1]))
    elif given.command == "clients":
        clients(Path(given.words[0]))
    else:
        cost(given.words)
