"""Random configurations, sound and unsound, and what becomes of each: it runs, or is refused in one line.

`python tests/fuzzing.py FIRST LAST FOLDER` tries those of the seeds from FIRST to below LAST, each in a process of
its own, and writes a line of JSON about each.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
from omegaconf import OmegaConf
from test_composition import names, overrides

from fl_sim.cli import FAILED, OK, USAGE
from fl_sim.composing import choices, conf_folder

ORDINARY = {
    "aggregator": "mean",
    "eraser": "fine_tune",
    "trigger": "badnets",
    "attack": "data_poisoning",
    "partition": "iid",
    "erasing": "every",
    "collusion": "none",
    "client": "sgd",
    "threat": "always",
    "server_optimizer": "plain",
    "sampler": "uniform",
    "detection": "none",
}
OTHER = {"engine": 0.3, "faults": 0.25, "model": 0.08, "tracker": 0.06, "data": 0.06, "experiment": 0.04}
"""The groups that are no matter of composition, and how often another choice is drawn for each."""
SPECIAL = (
    "clients=0 clients_per_round=0",
    "clients_per_round=7",
    "clients_per_round=0",
    "clients=1 clients_per_round=1",
    "clients=400 clients_per_round=2",
    "clients=270 clients_per_round=1 partition=iid",
    "partition=dirichlet partition.alpha=1e-3 partition.min_samples=0",
    "partition=dirichlet partition.alpha=1e-300",
    "partition=dirichlet partition.alpha=1e-3 partition.min_samples=1 client.batch_size=1",
    "partition=pathological partition.classes_per_client=1",
    "partition=pathological partition.classes_per_client=9",
    "partition=shards",
    "partition=quantity partition.alpha=0.01 partition.min_samples=1",
    "client.batch_size=1",
    "model=preact_resnet18 client.batch_size=1",
    "client.batch_size=100000",
    "backdoor.target=4",
    "backdoor.target=-1",
    "backdoor.rule=all_to_all",
    "backdoor.rule=source_specific backdoor.source=0",
    "backdoor.rule=source_specific backdoor.source=3",
    "backdoor.rule=clean_label",
    "trigger=badnets trigger.size=9",
    "trigger=badnets trigger.size=8",
    "trigger=badnets trigger.size=3 trigger.margin=6",
    "data.clean_fraction=0",
    "data.clean_fraction=0 eraser=none",
    "data.clean_fraction=0.99",
    "data.clean_fraction=1",
    "data.clean_fraction=0.02",
    "data.samples=4",
    "data.test_samples=1",
    "data.test_samples=0",
    "data.classes=2",
    "data.classes=300",
    "data.image_size=1",
    "data.image_size=5",
    "data.channels=3",
    "output=/dev/null/runs",
    "output=/proc/runs",
    "output='ä/ö'",
    "output='a\\tb'",
    "name='ä'",
    "name='💥'",
    "name=" + "x" * 80,
    "name=" + "x" * 81,
    "init=/dev/null",
    "init=/",
    "client.lr=1e300",
    "client.lr=1e-300",
    "client.lr=1e30",
    "server_optimizer.lr=1e30",
    "attack=model_replacement attack.boost=1e30",
    "threat.fraction=0",
    "threat.fraction=1",
    "assumed_attackers=0.99",
    "quorum=4 faults=dropout faults.probability=1",
    "quorum=1.0 below_quorum=repeat repeats=2 faults=crashes faults.probability=0.5",
    "eval.every=100 checkpoint.every=100",
    "seed=-1",
    "seed=18446744073709551616",
    "seeds.data=9223372036854775807",
)
"""What the texts of federated-learning tutorials never try."""
ODD = (
    *(
        "null",
        "true",
        "false",
        "",
        "[]",
        "{}",
        "[1,2]",
        "[null]",
        "{a:1}",
        "text",
        "'ü'",
        "'💥'",
        "💥",
        "'1'",
        "' '",
        "nan",
        "inf",
    ),
    *("-inf", "-1", "0", "1", "2", "1.0", "0.5", "-0.5", "1e-12", "1e12", "1e300", "-1e300", "1e400", "1_000", "0x10"),
    *("99999999999999999999", "-99999999999999999999", "2147483648", "auto", "none", "all", "'a,b'", "'\\n'", "../x"),
    *("/nope", "${seed}", "${nope}", "${oc.env:HOME}", "[[1]]", "[nan]", "[0.5,-1]", "[" + ",".join("1" * 1000) + "]"),
)
"""Values for any key."""


def drawn(seed: int) -> list[str]:
    """A configuration's words: mostly sensible choices, none or a few of them spoiled."""
    rng = random.Random(seed)
    row = {group: rng.choice(names(group)) if rng.random() < 0.3 else ORDINARY[group] for group in ORDINARY}
    words = [word for word in overrides(row) if not word.startswith("engine.")]
    for group in (group for group, often in OTHER.items() if rng.random() < often):
        own = ("data.clean_fraction",) if group == "data" else ()
        words = [word for word in words if not word.startswith(f"{group}.") or word.startswith(own or "-")]
        words.append(f"{group}={rng.choice(names(group))}")
    if rng.random() < 0.4:
        words += rng.choice(SPECIAL).split(" ") if rng.random() < 0.95 else [rng.choice(SPECIAL)]
    known = keys(dict(word.split("=", 1) for word in words if "=" in word))
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        key = rng.choice(sorted(known)) if rng.random() < 0.95 else rng.choice(("nope", "a.b", "", "clé", "data.x"))
        words.append(f"{key}={changed(rng, known.get(key))}")
    return [word for word in words if not word.startswith("data.download=")]  # whole data sets would be fetched


def keys(chosen: Mapping[str, str]) -> dict[str, Any]:
    """Every key there is under these choices, with its value in the files."""
    found = dict(flat(OmegaConf.to_container(OmegaConf.load(conf_folder() / "config.yaml"), resolve=False)))
    for group in (*ORDINARY, "engine", "faults", "model", "data", "tracker"):
        path = choices(group, [conf_folder()]).get(chosen.get(group, ORDINARY.get(group, "")))
        if path is not None:
            found |= flat(OmegaConf.to_container(OmegaConf.load(path)) or {}, f"{group}.")
    return found


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by their dotted paths."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if key in ("defaults", "paper", "fidelity"):
            continue
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def changed(rng: random.Random, value: Any) -> str:
    """Another value for a key: near the old one, or anything."""
    if isinstance(value, bool):
        near = [str(not value).lower()]
    elif isinstance(value, (int, float)):
        near = [0, -value, value + 1, value * 10, value / 10, value * 1.5, value / 2, int(value), float(value)]
    elif isinstance(value, list):
        near = [str(value[:1]), str([*value, *value]).replace(" ", ""), f"[{','.join('0' for _ in value)}]"]
    else:
        near = ["", "auto", "null", "0.5", "3"]
    return str(rng.choice(near) if rng.random() < 0.5 else rng.choice(ODD))


SECONDS = 10
"""Of a core: an accepted configuration that is still at work then has begun; it may be one of a billion epochs."""
ENDS = {OK: "ran", FAILED: "failed in a line", USAGE: "refused", None: "began"}


@dataclass(frozen=True)
class Outcome:
    """What became of one configuration."""

    words: Sequence[str]
    status: int | None
    """The exit status; None if it was still at work when its time was over."""
    said: str
    """All of stderr."""
    complaint: str | None
    """What is wrong with that; None if nothing is."""


def tried(words: Sequence[str], folder: Path, *, pictures: bool) -> Outcome:
    """`fl-sim run` in a fork of this process."""
    folder.mkdir()
    told = folder.with_suffix(".stderr")
    child = forks.forked(["run", *words], folder, told, pictures=pictures, cpu_seconds=SECONDS)
    status = forks.ended(child, 60 * SECONDS)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    status = None if status in (-signal.SIGXCPU, -signal.SIGKILL) else status
    said = told.read_text(errors="replace")
    return Outcome(words, status, said, wrong_with(status, said, folder))


def wrong_with(status: int | None, said: str, folder: Path) -> str | None:
    """What of a command's end breaks the promise: it runs, or says why not in one line; nothing half-made is left."""
    lines = said.splitlines()
    done = len(list(folder.rglob("done")))
    if "Traceback" in said or ("Error:" in said.replace("OSError:", "") and status not in (OK, FAILED)):
        return "a traceback"
    if status == USAGE:
        if len(lines) != 1 or not lines[0].startswith("fl-sim: ") or len(lines[0]) > 2000:
            return f"{len(lines)} lines, where one was promised"
        return "something is left behind" if list(folder.iterdir()) else None
    if status == FAILED:
        return "a failed run is marked as done" if done else None if len(lines) == 1 else f"{len(lines)} lines"
    if status == OK:
        failed = [line for path in folder.rglob("metrics.jsonl") for line in path.read_text().splitlines()]
        crashed = [line for line in failed if '"client_failed"' in line and "InjectedCrash" not in line]
        return f"a client failed: {crashed[0]}" if crashed else None if done == 1 else "not marked as done"
    return ("marked as done" if done else None) if status is None else f"exit status {status}"


def main_loop(first: int, last: int, top: Path) -> None:
    """A line of JSON for each seed, and a last one for all of them."""
    forks.warm()
    top.mkdir(parents=True, exist_ok=True)
    ends = Counter[str]()
    for seed in range(first, last):
        folder, started = top / str(seed), time.monotonic()
        found = tried(drawn(seed), folder, pictures=seed % 20 == 0)
        ends["complaint" if found.complaint else ENDS.get(found.status, "other")] += 1
        shutil.rmtree(folder)
        folder.with_suffix(".stderr").unlink()
        line = {"seed": seed, "took": round(time.monotonic() - started, 2)} | vars(found)
        print(json.dumps(line), flush=True)
    print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    main_loop(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
