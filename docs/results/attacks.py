"""Every trigger, attack and collusion against {no attack, no defense, multi-Krum, fine-tuning, NAD}.

    python docs/results/attacks.py run  [--jobs N] [--seeds 0,1,2] [OVERRIDE ...]   # makes runs/sweeps/attacks/*
    python docs/results/attacks.py table runs/sweeps/attacks                        # prints the table of attacks.md

`run` can be stopped and started again: finished runs are found. OVERRIDES are added to every run; `--rows
trigger/sig,attack/a3fl` and `--columns "no defense,nad"` make a part of the table, `--name` another folder.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tables import finished, interval, make

from fl_sim.composing import choices, conf_folder

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


def which(chosen: dict[str, str]) -> tuple[list[Row], str]:
    """The rows and the column of a run, by its choices."""
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
    """One line for each row; a run without erasing: the mean over its last ten rounds; with erasing: the means before
    and after its erasings."""
    cells: dict[Row, dict[str, dict[str, list[float | None]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for each in finished(folder):
        found, column = which(each.choices)
        for row in found:
            cell = cells[row][column]
            if each.summary["erasings"]:
                for key in ("asr_before", "asr", "acc"):
                    cell[key].append(each.erased(key))
            else:
                for key in ("asr", "acc"):
                    cell[key].append(each.last(key))
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
        make(jobs(only, given.columns.split(","), seeds, [*given.words, f"name={given.name}"]), given.jobs)
    else:
        table(Path(given.words[0]))
