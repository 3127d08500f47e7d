"""The tables of docs/results/digits.md, from the folder of a sweep: `python digits_erasing.py runs/sweeps/NAME`."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from tables import finished, interval


def label(config: dict) -> str:
    """What varies in these sweeps."""
    eraser = config["choices"]["eraser"]
    weights = config["eraser"].get("weights")
    name = eraser if weights is None else f"{eraser}, weights {'/'.join(f'{weight:g}' for weight in weights)}"
    return f"attack={config['choices']['attack']}, {name}"


def main(folder: Path) -> None:
    """Print one row for each setting, averaged over its seeds; a seed's erasings are averaged first."""
    columns: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in finished(folder):
        summary, row = run.summary, columns[label(run.config)]
        for key in ("acc", "asr", "asr_max"):
            row[key].append(summary[key])
        if erasings := summary["erasings"]:
            for key in ("asr_before", "asr", "acc_before", "acc", "seconds"):
                row[f"erasing {key}"].append(run.erased(key))
            row["worst"] += [e["asr"] / e["asr_before"] for e in erasings if e["asr_before"] >= 0.5]
    print("| setting | seeds | ASR before → after erasing | ACC before → after | highest ASR | final ACC | worst |")
    print("|---|---|---|---|---|---|---|")
    for name, row in sorted(columns.items()):
        asr = acc = worst = "–"
        if "erasing asr" in row:
            asr = f"{interval(row['erasing asr_before'], 3)} → {interval(row['erasing asr'], 3)}"
            acc = f"{interval(row['erasing acc_before'], 3)} → {interval(row['erasing acc'], 3)}"
        if row["worst"]:
            worst = f"{max(row['worst']):.2f}"
        rest = [asr, acc, interval(row["asr_max"], 3), interval(row["acc"], 3), worst]
        print(f"| {name} | {len(row['acc'])} | {' | '.join(rest)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
