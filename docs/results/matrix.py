"""Every aggregation rule × {no erasing, fine-tuning, NAD, PBE-clean} × {boosted attack, unboosted attack, no attack}.

    python docs/results/matrix.py run [--jobs N] [--seeds 0,1,2] [OVERRIDE ...]   # makes runs/sweeps/matrix/*
    python docs/results/matrix.py table runs/sweeps/matrix                        # prints the tables of matrix.md
    python docs/results/matrix.py picture runs/sweeps/matrix OUT.png              # the heat map

`run` can be stopped and started again: finished runs are found. It goes seed by seed, so that what is there at any time
can be shown. OVERRIDES are added to every run; `--rules median,krum` and `--erasers none,nad` make a part of it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tables import Finished, comebacks, finished, interval, make, mean

from fl_sim.composing import choices, conf_folder

ATTACKS = {"model_replacement": "boosted", "data_poisoning": "unboosted", "none": "no attack"}
ERASERS = ("none", "fine_tune", "nad", "pbe_clean")
CONTROLS = ("none", "nad")
"""The erasers that are run without an attack, too."""
CHEAPER = {"deepsight": ["aggregator.samples=2000"]}
"""A tenth of the paper's noise images, which at its own number take ten times as long as the federation itself."""
UNERASED = ("indicator",)
"""Rules so dear that they are run without erasing only."""
SAME = ("flower",)
"""Flower's FedMedian is `median`, which a test says."""

Key = tuple[str, str, str]
Cells = dict[Key, list[Finished]]


def rules() -> list[str]:
    return [name for name in choices("aggregator", [conf_folder()]) if name not in SAME]


def jobs(
    names: Sequence[str], erasers: Sequence[str], seeds: Sequence[int], extra: Sequence[str]
) -> Iterator[list[str]]:
    """All runs, seed by seed; the dearest eraser's of all seeds last."""
    for dear in (False, True):
        for seed in seeds:
            for eraser in [name for name in erasers if (name == "pbe_clean") is dear]:
                for attack in ATTACKS:
                    if attack == "none" and eraser not in CONTROLS:
                        continue
                    for name in names:
                        if eraser == "none" or name not in UNERASED:
                            chosen = [f"aggregator={name}", *CHEAPER.get(name, []), f"attack={attack}"]
                            yield [*chosen, f"eraser={eraser}", *extra, f"seed={seed}"]


def cells_of(folder: Path) -> Cells:
    """The runs of each (rule, attack, eraser)."""
    cells: Cells = defaultdict(list)
    for each in finished(folder):
        cells[each.choices["aggregator"], each.choices["attack"], each.choices["eraser"]].append(each)
    return cells


def rules_in(cells: Cells) -> list[str]:
    """The rules that there are runs of."""
    return [name for name in rules() if any(rule == name for rule, _, _ in cells)]


def erasers_in(cells: Cells, attack: str) -> list[str]:
    """The erasers that were run against an attack."""
    return [name for name in ERASERS if any((against, eraser) == (attack, name) for _, against, eraser in cells)]


def shown(runs: Sequence[Finished]) -> str:
    """ACC, ASR over the last ten rounds and, where the server erases, ASR right after its erasings."""
    if not runs:
        return "–"
    acc = interval([each.last("acc") for each in runs]).split(" ")[0]
    text = f"{acc}, {interval([each.last('asr') for each in runs])}"
    after = [each.erased("asr") for each in runs]
    return text if None in after else f"{text}; {interval(after).split(' ')[0]}"


def rates(runs: Sequence[Finished]) -> str:
    """TPR / FPR over the rounds with attackers, where the rule says whom it kept."""
    rounds = [
        [event for event in each.events if event["event"] == "round" and event["malicious"] and "tpr" in event]
        for each in runs
    ]
    if not any(rounds):
        return "–"
    tpr, fpr = ([mean(event.get(key) for event in events) for events in rounds] for key in ("tpr", "fpr"))
    return f"{interval(tpr).split(' ')[0]} / {interval(fpr).split(' ')[0]}"


def durations(runs: Sequence[Finished]) -> str:
    """In how many of the erasings of a standing backdoor it came back before the next one, and how soon."""
    met, back = comebacks(runs)
    if not met:
        return "–"
    return f"{len(back)}/{met}" + (f", {mean(iter(back)):.1f}" if back else "")


def table(folder: Path) -> None:
    """One table for each attack, and one of durability."""
    cells = cells_of(folder)
    print(f"{sum(len(runs) for runs in cells.values())} runs")
    for attack, words in ATTACKS.items():
        erasers = erasers_in(cells, attack)
        known = [name for name in rules() if any((name, attack, eraser) in cells for eraser in erasers)]
        print(f"\n### {words} ({attack})\n")
        print("| rule | TPR / FPR | " + " | ".join(f"`{eraser}`" for eraser in erasers) + " |")
        print("|---" * (len(erasers) + 2) + "|")
        for name in known:
            found = [cells.get((name, attack, eraser), []) for eraser in erasers]
            print(f"| `{name}` | {rates(found[0])} | {' | '.join(shown(runs) for runs in found)} |")
    print("\n### durability\n")
    columns = [(attack, eraser) for attack in list(ATTACKS)[:2] for eraser in erasers_in(cells, attack)[1:]]
    print("| rule | " + " | ".join(f"{ATTACKS[attack]}, `{eraser}`" for attack, eraser in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in rules_in(cells):
        print(f"| `{name}` | {' | '.join(durations(cells.get((name, *column), [])) for column in columns)} |")


def picture(folder: Path, target: Path) -> None:
    """Rules × erasers, one panel for each attack and measure, each cell with its number."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = cells_of(folder)
    names = rules_in(cells)
    panels = [("model_replacement", "asr"), ("data_poisoning", "asr"), ("model_replacement", "acc"), ("none", "acc")]
    figure = Figure(figsize=(13, 0.31 * len(names) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    widths = [len(erasers_in(cells, attack)) for attack, _ in panels]
    grids: Any = figure.subplots(1, len(panels), width_ratios=widths, sharey=True)
    for axes, (attack, measure) in zip(grids, panels, strict=True):
        erasers = erasers_in(cells, attack)
        values = [
            [mean(each.last(measure) for each in cells.get((name, attack, eraser), [])) for eraser in erasers]
            for name in names
        ]
        numbers = [[float("nan") if value is None else value for value in row] for row in values]
        # Cividis is made for colour-blind readers and rises in lightness; bright is good in every panel.
        low, high, colours = (0.0, 1.0, "cividis_r") if measure == "asr" else (0.7, 1.0, "cividis")
        axes.imshow(numbers, vmin=low, vmax=high, cmap=colours, aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                bright = value is not None and (value < 0.5 if measure == "asr" else value > 0.85)
                text = "–" if value is None else f"{value:.2f}"
                axes.text(
                    x,
                    y,
                    text,
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="0.4" if value is None else "black" if bright else "white",
                )
        axes.set_xticks(range(len(erasers)), erasers, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{measure.upper()}, {ATTACKS[attack]}", fontsize=10)
    figure.supxlabel("eraser; means over the last ten rounds and all seeds; bright is good", fontsize=9)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["run", "table", "picture"])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rules", default=",".join(rules()))
    parser.add_argument("--erasers", default=",".join(ERASERS))
    parser.add_argument("--name", default="matrix")
    given = parser.parse_intermixed_args()
    if given.command == "run":
        extra = [*given.words, f"name={given.name}"]
        seeds = [int(seed) for seed in given.seeds.split(",")]
        make(list(jobs(given.rules.split(","), given.erasers.split(","), seeds, extra)), given.jobs)
    elif given.command == "table":
        table(Path(given.words[0]))
    else:
        picture(Path(given.words[0]), Path(given.words[1]))
