"""Runs that are killed at random moments, and resumed until they are through: is anything lost, doubled or changed?

`python tests/killing.py KILLS FOLDER [WORDS...]` prints a line of JSON for each run, and ends with 1 if one of them
differs from the run that nobody disturbed; `WORDS` are `tracker=wandb`, `engine=ray` and the like. Killed by SIGKILL,
half of the times at a moment drawn over the whole run, half of the times a moment after a phase that is drawn
(training, erasing, evaluation, the checkpoint's writing) has begun. Half of the times it is resumed at once, half of
the times when all that the killed process had started is gone.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forks
import tiny
import torch
from dashboards import READERS

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
PATIENCE = 300.0
"""Seconds: what a killed process has started and is still there then is left for good."""


@dataclass
class Killer:
    """What it has done so far."""

    words: Sequence[str]
    rng: random.Random
    moments: Counter[str] = field(default_factory=Counter)
    """In which phases runs were killed."""
    orphans: list[float] = field(default_factory=list)
    """For how many seconds something of a killed process went on without it."""
    stayed: list[str] = field(default_factory=list)
    """The commands of what did not end of itself."""
    phase: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 1))

    def run(self, top: Path, name: str, takes: float) -> Path:
        """One run, killed and resumed until it is done; its folder."""
        top.mkdir()
        kills, words = 0, self.command(top / "runs", name)
        while True:
            self.phase[0] = 0
            child = forks.forked(words, top, top / "stderr", memory=None, phase=self.phase)
            status = self._shot(child, takes) if kills < 6 else forks.ended(child, 600)
            folders = [path.parent for path in (top / "runs").glob("*/*/config.yaml")]
            if status == 0:
                return folders[0]
            if status != -signal.SIGKILL:
                raise SystemExit(f"{name}: exit status {status}\n{(top / 'stderr').read_text()}")
            kills += 1
            self.moments[forks.PHASES[self.phase[0]]] += 1
            if self.rng.random() < 0.5:
                self._outlive(child)
            if folders:  # before that there is nothing to resume
                words = ["resume", str(folders[0])]

    def command(self, output: Path, name: str) -> list[str]:
        return ["run", *tiny.TINY, *COMMON, *RUNS[name], *self.words, f"name={name}", f"output={output}"]

    def _shot(self, child: int, takes: float) -> int:
        """Kill it at a random moment, unless it is done before."""
        if self.rng.random() < 0.5:
            status = forks.ended(child, self.rng.uniform(0, takes))
        else:
            target, after = forks.PHASES.index(self.rng.choice(TARGETS)), self.rng.uniform(0, 0.02)
            wait, status = self.rng.uniform(0, takes), forks.ended(child, 0)
            begun = time.monotonic()
            while status is None and (self.phase[0] != target or time.monotonic() < begun + wait):
                done, code = os.waitpid(child, os.WNOHANG)
                status = os.waitstatus_to_exitcode(code) if done else None
                time.sleep(0.0005)
            status = forks.ended(child, after) if status is None else status
        if status is None:
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status

    def _outlive(self, child: int) -> None:
        """Wait until all is gone that a killed process had started; end what does not go of itself."""
        begun = time.monotonic()
        while left := forks.started_by(child):
            if time.monotonic() > begun + PATIENCE:
                self.stayed += left.values()
                for each in left:
                    os.kill(each, signal.SIGKILL)
                break
            time.sleep(0.02)
        self.orphans.append(time.monotonic() - begun)


def killed(top: Path, kills: int, words: Sequence[str] = (), seed: int = 0) -> int:
    """How many runs differ from the undisturbed one."""
    forks.warm()
    warnings.simplefilter("ignore")  # MLflow and Ray have theirs
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="kill-")  # short, as Ray has sockets in it
    shared = set(os.listdir("/dev/shm"))
    killer = Killer(words, random.Random(seed))
    whole, takes = {}, {}
    for name in RUNS:
        started = time.monotonic()
        told = top / "stderr"
        if forks.ended(forks.forked(killer.command(top / "whole", name), top, told, memory=None), 600) != 0:
            raise SystemExit(told.read_text())
        [done] = (top / "whole").glob(f"*/*_{name}_*/done")
        whole[name], takes[name] = everything(done.parent), time.monotonic() - started
    wrong = number = 0
    while killer.moments.total() < kills:
        name, number = list(RUNS)[number % 2], number + 1
        had = Counter(killer.moments)
        folder = killer.run(top / str(number), name, takes[name])
        left = [path.name for path in folder.rglob("*.part")]
        different = [key for key, value in everything(folder).items() if value != whole[name][key]]
        wrong += bool(different or left)
        line = {"run": name, "kills": killer.moments - had, "different": different, "left": left}
        print(json.dumps(line | {"kills_so_far": killer.moments.total()}), flush=True)
        shutil.rmtree(top / str(number))
    found = {
        "runs": number,
        "kills": killer.moments.total(),
        "in": killer.moments,
        "different": wrong,
        "waited_for": len(killer.orphans),
        "longest_orphan_seconds": round(max(killer.orphans, default=0.0), 2),
        "stayed": killer.stayed,
        "temporary_files": sorted(os.listdir(os.environ["TMPDIR"])),
        "shared_memory_files": sorted(set(os.listdir("/dev/shm")) - shared),
    }
    print(json.dumps(found), flush=True)
    shutil.rmtree(os.environ["TMPDIR"])
    return wrong


def everything(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind, but what a clock decides."""
    summary = json.loads((folder / "summary.json").read_text())
    states = {str(path.relative_to(folder)): _plain(torch.load(path)) for path in sorted(folder.rglob("*.pt"))}
    files = (path.relative_to(folder) for path in folder.rglob("*"))
    return {
        "metrics": tiny.numbers(folder),
        "summary": _clockless(summary),
        # A tracker's files have the date and the process in their names.
        "files": sorted(str(path) for path in files if not {"wandb", "tensorboard"} & {*path.parts[:-1]}),
        "curves": _curves(folder),
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


def _curves(folder: Path) -> list[tuple[str, int, float]]:
    """Every point that the run's tracker shows, as often as it is there."""
    tracker = tiny.chosen(folder, "tracker")
    points = READERS[tracker](folder) if tracker in READERS else ()
    found = sorted((each.tag, each.step, each.value) for each in points if "seconds" not in each.tag)
    if tracker in READERS and len(found) < 50:
        raise SystemExit(f"{folder}: {len(found)} points in {tracker}, where there should be many")
    return found


if __name__ == "__main__":
    where = Path(sys.argv[2])
    where.mkdir(parents=True)
    sys.exit(bool(killed(where.resolve(), int(sys.argv[1]), sys.argv[3:])))
