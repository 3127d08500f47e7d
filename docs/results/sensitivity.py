"""How much the erasers without public code depend on each choice: one factor at a time around the defaults.

    python docs/results/sensitivity.py run OUT.jsonl [--seeds 0,1,2] [--erasers linf,nba] [OVERRIDE ...]
    python docs/results/sensitivity.py table OUT.jsonl                            # prints the tables of sensitivity.md

All settings of a seed erase the same victim, with the same draws. `run` writes a line for each setting and goes on
where it was stopped; the victims are kept beside the file. OVERRIDES belong to every victim.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tables import interval

from fl_sim import execution
from fl_sim.central import Both, cached_victim, try_eraser
from fl_sim.composing import compose_config
from fl_sim.detection import Screening
from fl_sim.metrics import evaluate
from fl_sim.schema import construct, locate

TRIGGERS = ("badnets", "blend")
FACTORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "linf": (
        ("probe=trigger",),
        ("probe=clean",),
        ("norm=l1",),
        ("norm=l2",),
        ("tolerance=0.05",),
        ("tolerance=0.1",),
        ("inversion.steps=50",),
        ("inversion.steps=800",),
    ),
    "nba": (
        ("response=0",),
        ("learning=0",),
        ("prediction=0",),
        ("unlearning=0",),
        ("response=0", "learning=0", "prediction=0", "unlearning=0"),
        ("temperature=1",),
        ("radius=0.125",),
        ("crafting=sample",),
        ("crafting_steps=1",),
        ("min_steps=200",),
    ),
    "pbe_clean": (
        ("suppression=0",),
        ("suppression=1",),
        ("suppression=16",),
        ("attention=[0]",),
        ("suppression=0", "attention=[0]"),
        ("patch_size=3",),
        ("patch_size=4",),
        ("min_steps=200",),
        ("student=new_head",),
    ),
    "pbe": (
        ("suppression=0",),
        ("suppression=16",),
        ("attention=[0]",),
        ("patch_size=3",),
        ("statistics=0",),
        ("diversity=0",),
        ("disagreement=0",),
        ("min_steps=200",),
    ),
}
"""For each eraser, what is changed at a time; the defaults come first in every table."""
UNWATCHED = "central.track.every=null"
"""Scores on the way are not needed here."""

Cell = tuple[str, str, str]


def settings(eraser: str) -> Iterator[tuple[str, ...]]:
    """The changes of each row; none are the defaults."""
    yield ()
    yield from FACTORS[eraser]


def label(changes: Sequence[str]) -> str:
    return ", ".join(changes) or "defaults"


def lines(out: Path) -> list[dict[str, Any]]:
    """What has been measured; the rest of a line that was being written is not."""
    text = out.read_text() if out.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def measure(out: Path, erasers: Sequence[str], seeds: Sequence[int], extra: Sequence[str]) -> None:
    """Eraser by eraser, so that what is there at any time is whole tables."""
    kept = lines(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(line) + "\n" for line in kept))
    done = {(line["eraser"], line["setting"], line["trigger"], line["seed"]) for line in kept}
    silent = Both()
    for eraser in erasers:
        for seed in seeds:
            for trigger in TRIGGERS:
                wanted = [each for each in settings(eraser) if (eraser, label(each), trigger, seed) not in done]
                if not wanted:
                    continue
                config = compose_config(["eraser=none", f"trigger={trigger}", UNWATCHED, *extra, f"seed={seed}"])
                world = execution.prepare(config)
                plan = world.parts.settings.central
                victim = cached_victim(world, plan, silent, config, out.parent / "victims")
                before = evaluate(victim.model, world.test, world.backdoor.recalling(victim.record))
                screening = Screening({}, world.test, seed, silent)
                for changes in wanted:
                    values = compose_config([f"eraser={eraser}", *(f"eraser.{each}" for each in changes)])["eraser"]
                    method = construct(locate(values["_target_"]), values)
                    fields, _ = try_eraser(world, victim, before, eraser, method, screening, silent)
                    own = {"eraser": eraser, "setting": label(changes), "trigger": trigger, "seed": seed}
                    with out.open("a") as file:
                        file.write(json.dumps(fields | own) + "\n")
                    print(own, fields["acc"], fields["asr"], flush=True)


def show(out: Path) -> None:
    """One table for each eraser: a row for each setting; ACC's mean and ASR's interval for each trigger."""
    acc: dict[Cell, list[float | None]] = defaultdict(list)
    asr: dict[Cell, list[float | None]] = defaultdict(list)
    for line in lines(out):
        cell = (line["eraser"], line["setting"], line["trigger"])
        acc[cell].append(line["acc"])
        asr[cell].append(line["asr"])
    for eraser in FACTORS:
        print(f"\n| `{eraser}` | {' | '.join(f'{trigger}: ACC, ASR' for trigger in TRIGGERS)} | seeds |")
        print("|---|" + "---|" * (len(TRIGGERS) + 1))
        for changes in settings(eraser):
            shown = []
            for trigger in TRIGGERS:
                cell = (eraser, label(changes), trigger)
                mean = interval(acc[cell]).split(" ")[0]
                shown.append(f"{mean}, {interval(asr[cell])}" if asr[cell] else "–")
            seeds = max(len(asr[eraser, label(changes), trigger]) for trigger in TRIGGERS)
            name = ", ".join(f"`{change}`" for change in changes) or "defaults"
            print(f"| {name} | {' | '.join(shown)} | {seeds} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("out", type=Path)
    run.add_argument("--seeds", default="0,1,2")
    run.add_argument("--erasers", default=",".join(FACTORS))
    run.add_argument("overrides", nargs="*")
    table = commands.add_parser("table")
    table.add_argument("out", type=Path)
    asked = parser.parse_args()
    if asked.command == "run":
        measure(asked.out, asked.erasers.split(","), [int(seed) for seed in asked.seeds.split(",")], asked.overrides)
    else:
        show(asked.out)


if __name__ == "__main__":
    main()
