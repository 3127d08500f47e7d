"""A page of curves, one panel for each attack of a sweep: `python attack_curves.py runs/sweeps/NAME OUT.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fl_sim.summary import ACC_COLOUR, ASR_COLOUR


def read(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By attack and eraser: the events of its run."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(folder.glob("*/done")):
        chosen = yaml.safe_load((path.parent / "config.yaml").read_text())["choices"]
        name = chosen["trigger"] if chosen["attack"] == "model_replacement" else chosen["attack"]
        events = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        found.setdefault(name, {})[chosen["eraser"]] = events
    return found


def points(events: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Round by round, with a vertical step from before to after at each erasing."""
    before = {e["round"]: e[f"{key}_before"] for e in events if e["event"] == "erase"}
    return [
        (e["round"], value)
        for e in events
        if e["event"] == "round"
        for value in (before.get(e["round"]), e[key])
        if value is not None
    ]


def main(folder: Path, target: Path) -> None:
    """Full lines without a defense, dashed ones with NAD."""
    found = read(folder)
    columns = 4
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (name, runs) in enumerate(sorted(found.items())):
        axes = figure.add_subplot(rows, columns, number + 1)
        for eraser, style in (("none", "-"), ("nad", "--")):
            for key, colour in (("acc", ACC_COLOUR), ("asr", ASR_COLOUR)):
                if eraser in runs:
                    label = f"{key.upper()}, {'no defense' if eraser == 'none' else 'NAD'}"
                    axes.plot(*zip(*points(runs[eraser], key), strict=True), style, color=colour, lw=1.3, label=label)
        axes.set_title(name, fontsize=10)
        axes.set_ylim(-0.03, 1.05)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
