"""Every trigger, attack and collusion against {no attack, no defense, multi-Krum, fine-tuning, NAD}.

    python docs/results/attacks.py run  [--jobs N] [--seeds 0,1,2] [OVERRIDE ...]   # makes runs/sweeps/attacks/*
    python docs/results/attacks.py table runs/sweeps/attacks                        # prints the table of attacks.md

`run` can be stopped and started again: finished runs are found. OVERRIDES are added to every run; `--rows
trigger/sig,attack/a3fl` and `--columns "no defense,nad"` make a part of the table, `--name` another folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from fl_sim.build import choices, conf_folder
from fl_sim.sweep import Outcome, side_by_side

Row = tuple[str, str]
DEFENSES = {
    "attack=none": ["eraser=none"],
    "no defense": ["eraser=none"],
    "multi_krum": ["aggregator=multi_krum", "eraser=none"],
    "fine_tune": ["eraser=fine_tune"],
    "nad": ["eraser=nad"],
}


def rows() -> dict[Row, list[str]]:
    """Every trigger with the default attack; every other attack, and every collusion, with the default trigger."""
    names = {group: list(choices(group, [conf_folder()])) for group in ("trigger", "attack", "collusion")}
    found: dict[Row, list[str]] = {("trigger", name): [f"trigger={name}"] for name in names["trigger"]}
    for name in names["attack"]:
        if name not in ("none", "model_replacement"):
            found["attack", name] = [f"attack={name}"]
    for name in names["collusion"]:
        if name != "none":
            found["collusion", name] = ["attack=data_poisoning", f"collusion={name}"]
    return found


def jobs(only: Sequence[str], columns: Sequence[str], seeds: Sequence[int], extra: Sequence[str]) -> list[list[str]]:
    """All runs, each once; the clean federation of an attack is that of its trigger."""
    wanted: dict[tuple[str, ...], None] = {}
    for (group, name), words in rows().items():
        if only and f"{group}/{name}" not in only:
            continue
        for column in columns:
            attack = words
            if column == "attack=none":
                attack = [*(words if group == "trigger" else []), "attack=none"]
            for seed in seeds:
                wanted[*extra, *attack, *DEFENSES[column], f"seed={seed}"] = None
    return [list(job) for job in wanted]


def run(processes: int, wanted: list[list[str]]) -> None:
    print(f"{len(wanted)} runs, {processes} at a time", flush=True)
    outcome: Outcome
    for number, outcome in enumerate(side_by_side(wanted, processes), start=1):
        print(f"[{number}/{len(wanted)}] {' '.join(outcome.job)}: {outcome.state}", flush=True)
        if outcome.complaint:
            print(outcome.complaint, file=sys.stderr, flush=True)


def interval(values: Sequence[float | None]) -> str:
    """Mean ± half the 95 % interval of the mean (Student's t)."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    if len(known) < 2:
        return f"{known[0]:.2f}"
    half = student.ppf(0.975, len(known) - 1) * statistics.stdev(known) / len(known) ** 0.5
    return f"{statistics.mean(known):.2f} ± {half:.2f}"


def which(config: dict[str, Any]) -> tuple[list[Row], str]:
    """The rows and the column of a run."""
    chosen = config["choices"]
    if chosen["attack"] == "none" and chosen["collusion"] == "none":
        column = "attack=none"
        group = [("trigger", chosen["trigger"])]
        if chosen["trigger"] == "badnets":
            group += [row for row in rows() if row[0] != "trigger"]
        return group, column
    column = next(c for c in ("fine_tune", "nad", "none") if c == chosen["eraser"])
    if column == "none":
        column = "multi_krum" if chosen["aggregator"] == "multi_krum" else "no defense"
    if chosen["collusion"] != "none":
        return [("collusion", chosen["collusion"])], column
    if chosen["attack"] != "model_replacement":
        return [("attack", chosen["attack"])], column
    return [("trigger", chosen["trigger"])], column


def table(folder: Path) -> None:
    """One line for each row; ASR of a run without erasing: the mean over its last ten rounds, which one round's cohort
    sways less than the final value; with erasing: the means before and after its erasings."""
    import yaml

    cells: dict[Row, dict[str, dict[str, list[float | None]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for path in sorted(folder.glob("*/summary.json")):
        if not (path.parent / "done").exists():
            continue
        summary = json.loads(path.read_text())
        events = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        last = [event for event in events if event["event"] == "round"][-10:]
        found, column = which(yaml.safe_load((path.parent / "config.yaml").read_text()))
        for row in found:
            cell = cells[row][column]
            if erasings := summary["erasings"]:
                for key in ("asr_before", "asr", "acc"):
                    values = [e[key] for e in erasings if e[key] is not None]
                    cell[key].append(statistics.mean(values) if values else None)
            else:
                for key in ("asr", "acc"):
                    values = [event[key] for event in last if event[key] is not None]
                    cell[key].append(statistics.mean(values) if values else None)
    print("| | " + " | ".join(f"{column}: ACC, ASR" for column in DEFENSES) + " |")
    print("|---|---|---|---|---|---|")
    for row in [row for row in rows() if row in cells]:
        texts = []
        for column in DEFENSES:
            cell = cells[row][column]
            asr = interval(cell["asr"])
            if cell["asr_before"]:
                asr = f"{interval(cell['asr_before']).split(' ')[0]} → {asr}"
            texts.append(f"{interval(cell['acc']).split(' ')[0]}, {asr}" if cell["acc"] else "–")
        print(f"| {row[0]} `{row[1]}` | {' | '.join(texts)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", default="", help="such as trigger/sig,attack/a3fl; all by default")
    parser.add_argument("--columns", default=",".join(DEFENSES))
    parser.add_argument("--name", default="attacks")
    given = parser.parse_intermixed_args()
    if given.command == "run":
        only = [name for name in given.rows.split(",") if name]
        seeds = [int(seed) for seed in given.seeds.split(",")]
        # A preset's name would win over one that stands before it.
        run(given.jobs, jobs(only, given.columns.split(","), seeds, [*given.words, f"name={given.name}"]))
    else:
        table(Path(given.words[0]))
