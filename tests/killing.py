"""Runs that are killed at random moments, and resumed until they are through: is anything lost, doubled or changed?

`python tests/killing.py KILLS FOLDER` prints a line of JSON for each run, and ends with 1 if one of them differs
from the run that nobody disturbed. Killed by SIGKILL, half of the times at a moment drawn over the whole run, half of
the times a moment after a phase that is drawn (training, erasing, evaluation, the checkpoint's writing) has begun.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import forks
import tiny
import torch

TARGETS = ("training", "aggregation", "erasing", "evaluation", "checkpoint", "summary")
COMMON = ("rounds=6", "data.clean_fraction=0.1", "engine.workers=2", "tracker=tensorboard")
RUNS = {
    "teachers": (
        *("client=fed_nad", "client.lr=0.01", "attack=data_poisoning", "aggregator=foolsgold"),
        *("eraser=pbe", "eraser.epochs=1", "eraser.min_steps=3", "eraser.warm_up=2", "eraser.latent=8"),
        *("erasing.rounds=2", "erasing.floor=0", "server_optimizer=momentum", "server_optimizer.lr=0.5"),
    ),
    "triggers": (
        *("attack=a3fl", "aggregator=fldetector", "aggregator.window=2", "server_optimizer=adam", "attack.boost=2"),
        *("eraser=fine_tune", "eraser.epochs=1", "eraser.min_steps=4", "erasing.rounds=2", "erasing.floor=0"),
        *("faults=stragglers", "faults.late=next_round", "faults.deadline=1.2", "detection=scale_up"),
        *("checkpoint.every=2",),
    ),
}
"""Clients that remember, and a learned trigger; rules, an eraser, server optimisers and late replies that do."""


def killed(top: Path, kills: int, seed: int = 0) -> int:
    """How many runs differ from the undisturbed one."""
    forks.warm()
    rng = random.Random(seed)
    phase = mmap.mmap(-1, 1)
    whole, takes = {}, {}
    for name, words in RUNS.items():
        started = time.monotonic()
        command = ["run", *tiny.TINY, *COMMON, *words, f"name={name}", f"output={top / 'whole'}"]
        told = top / "stderr"
        if forks.ended(forks.forked(command, top, told), 600) != 0:
            raise SystemExit(told.read_text())
        [done] = (top / "whole").glob(f"*/*_{name}_*/done")
        whole[name], takes[name] = everything(done.parent), time.monotonic() - started
    moments = Counter[str]()
    wrong = number = 0
    while moments.total() < kills:
        name, number = list(RUNS)[number % 2], number + 1
        folder, mine = _one(top / str(number), name, takes[name], rng, phase)
        moments += mine
        left = [path.name for path in folder.rglob("*.part")]
        different = [key for key, value in everything(folder).items() if value != whole[name][key]]
        wrong += bool(different or left)
        line = {"run": name, "kills": mine, "different": different, "left": left, "kills_so_far": moments.total()}
        print(json.dumps(line), flush=True)
        shutil.rmtree(top / str(number))
    print(json.dumps({"runs": number, "kills": moments.total(), "in": moments, "different": wrong}), flush=True)
    return wrong


def _one(top: Path, name: str, takes: float, rng: random.Random, phase: mmap.mmap) -> tuple[Path, Counter[str]]:
    """One run, killed and resumed until it is done; its folder, and in which phases it was killed."""
    top.mkdir()
    moments = Counter[str]()
    words = ["run", *tiny.TINY, *COMMON, *RUNS[name], f"name={name}", f"output={top / 'runs'}"]
    while True:
        phase[0] = 0
        told = top / "stderr"
        child = forks.forked(words, top, told, phase=phase)
        status = _shot(child, rng, takes, phase) if moments.total() < 6 else forks.ended(child, 600)
        folders = [path.parent for path in (top / "runs").glob("*/*/config.yaml")]
        if status == 0:
            return folders[0], moments
        if status != -signal.SIGKILL:
            raise SystemExit(f"{name}: exit status {status}\n{told.read_text()}")
        moments[forks.PHASES[phase[0]]] += 1
        if folders:  # before that there is nothing to resume
            words = ["resume", str(folders[0])]


def _shot(child: int, rng: random.Random, takes: float, phase: mmap.mmap) -> int:
    """Kill it at a random moment, unless it is done before."""
    if rng.random() < 0.5:
        status = forks.ended(child, rng.uniform(0, takes))
    else:
        target, after = forks.PHASES.index(rng.choice(TARGETS)), rng.uniform(0, 0.02)
        wait, status = rng.uniform(0, takes), forks.ended(child, 0)
        begun = time.monotonic()
        while status is None and (phase[0] != target or time.monotonic() < begun + wait):
            done, code = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if done else None
        status = forks.ended(child, after) if status is None else status
    if status is None:
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status


def everything(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind, but what a clock decides."""
    summary = json.loads((folder / "summary.json").read_text())
    states = {str(path.relative_to(folder)): _plain(torch.load(path)) for path in sorted(folder.rglob("*.pt"))}
    return {
        "metrics": tiny.numbers(folder),
        "summary": _clockless(summary),
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "tfevents" not in path.name),
        "tensorboard": _curves(folder),
        **states,
    }


def _clockless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _clockless(each) for key, each in value.items() if "seconds" not in str(key)}
    return [_clockless(each) for each in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Tensors as their bytes, which compare bit for bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, Mapping):
        # Lines of the record hold seconds, so its length in bytes varies.
        return {key: _plain(v) for key, v in value.items() if key != "metrics_length" and "seconds" not in str(key)}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reading = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = reading.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    tags = [tag for tag in found.Tags()["scalars"] if "seconds" not in tag]
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags}


if __name__ == "__main__":
    where = Path(sys.argv[2])
    where.mkdir(parents=True)
    sys.exit(bool(killed(where, int(sys.argv[1]))))
