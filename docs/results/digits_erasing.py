"""The tables of docs/results/digits.md, from the folder of a sweep: `python digits_erasing.py runs/sweeps/NAME`."""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import yaml
from scipy.stats import t as student


def label(config: dict) -> str:
    """What varies in these sweeps."""
    eraser = config["choices"]["eraser"]
    weights = config["eraser"].get("weights")
    name = eraser if weights is None else f"{eraser}, weights {'/'.join(f'{weight:g}' for weight in weights)}"
    return f"attack={config['choices']['attack']}, {name}"


def interval(values: list[float]) -> str:
    """Mean ± half the 95 % interval of the mean (Student's t)."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def main(folder: Path) -> None:
    """Print one row for each setting, averaged over its seeds; a seed's erasings are averaged first."""
    columns: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*/summary.json")):
        if not (path.parent / "done").exists():
            continue
        summary = json.loads(path.read_text())
        row = columns[label(yaml.safe_load((path.parent / "config.yaml").read_text()))]
        for key in ("acc", "asr", "asr_max"):
            row[key].append(summary[key])
        if erasings := summary["erasings"]:
            for key in ("asr_before", "asr", "acc_before", "acc", "seconds"):
                row[f"erasing {key}"].append(statistics.mean(erasing[key] for erasing in erasings))
            row["worst"] += [e["asr"] / e["asr_before"] for e in erasings if e["asr_before"] >= 0.5]
    print("| setting | seeds | ASR before → after erasing | ACC before → after | highest ASR | final ACC | worst |")
    print("|---|---|---|---|---|---|---|")
    for name, row in sorted(columns.items()):
        asr = acc = worst = "–"
        if "erasing asr" in row:
            asr = f"{interval(row['erasing asr_before'])} → {interval(row['erasing asr'])}"
            acc = f"{interval(row['erasing acc_before'])} → {interval(row['erasing acc'])}"
        if row["worst"]:
            worst = f"{max(row['worst']):.2f}"
        rest = [asr, acc, interval(row["asr_max"]), interval(row["acc"]), worst]
        print(f"| {name} | {len(row['acc'])} | {' | '.join(rest)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
