"""What each aggregation rule costs on 100 updates of 11 million parameters: seconds, and memory beside the stack.

    python benchmarks/aggregators.py -o aggregators.json               # needs 12 GB
    python benchmarks/aggregators.py --model cnn median krum           # a smaller model, two rules

Each rule runs in a fresh process: one round, and a second one, which then counts, if the rule remembers anything.
Memory is the process's peak beyond what it held with the stack made. Rules that train or test models do so on 200
clean images; DeepSight and FLARE on fewer images than by default, since a forward pass of 60,000 images through each
of 100 models takes hours on a CPU. A rule that is not through in `--limit` seconds is ended, and said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

from storing import count, json_file, store

SHAPE, CLASSES = (3, 32, 32), 10
SMALLER: dict[str, dict[str, Any]] = {
    "deepsight": {"samples": 4, "draws": 1},
    "flare": {"samples": 20},
}
"""Settings with which a rule is measured, where its own would take hours."""


def one(name: str, architecture: str, clients: int) -> dict[str, Any]:
    """One rule, in this process."""
    import torch
    from omegaconf import OmegaConf

    from fl_sim.augment import Augment
    from fl_sim.build import component
    from fl_sim.composing import conf_folder
    from fl_sim.layout import Layout
    from fl_sim.models.classifier import build_classifier
    from fl_sim.packing import ThisMachine, forget_peak
    from fl_sim.protocols import ServerContext
    from fl_sim.samples import Samples
    from fl_sim.training import fit

    def section(group: str, choice: str) -> Any:
        return OmegaConf.to_container(OmegaConf.load(conf_folder() / group / f"{choice}.yaml"))

    rng = torch.Generator().manual_seed(0)
    new_model = partial(
        build_classifier,
        component("model", section("model", architecture)),
        SHAPE,
        CLASSES,
        (0.5,) * 3,
        (0.5,) * 3,
        rng,
    )
    model = new_model()
    layout = Layout.of(model)
    images = torch.randint(0, 256, (200, *SHAPE), dtype=torch.uint8, generator=rng)
    ctx = ServerContext(
        round=1,
        rng=rng,
        device=torch.device("cpu"),
        classes=CLASSES,
        clients=tuple(range(clients)),
        assumed_attackers=clients // 5,
        layout=layout,
        vector=layout.read(model),
        clean=Samples(images, torch.arange(200) % CLASSES),
        augment=Augment(),
        new_model=new_model,
        fit=fit,
    )
    # Noise that repeats within a row, shifted from row to row: drawing a billion numbers would take most of the time.
    noise = 0.01 * torch.randn(1_000_003, generator=rng)
    deltas = torch.empty(clients, layout.parameters)
    long = noise.repeat(-(-(layout.parameters + 997 * clients) // len(noise)))
    for row in range(clients):
        deltas[row] = long[997 * row : 997 * row + layout.parameters]
    del long
    weights = torch.full((clients,), 1 / clients)
    rule = component("aggregator", section("aggregator", name) | SMALLER.get(name, {}))
    forget_peak()
    before, _ = ThisMachine().held(os.getpid())
    state: Any = {}
    for t in (1, 2):
        started, processor = time.perf_counter(), time.process_time()
        state = rule.aggregate(deltas, weights, state, replace(ctx, round=t)).state
        seconds, spent = time.perf_counter() - started, time.process_time() - processor
        if not state:  # without a memory the second round would be the first again
            break
    return {
        "rule": name,
        "seconds": seconds,
        "cpu_seconds": spent,
        "extra_over_stack": (ThisMachine().held(os.getpid())[1] - before) / (deltas.numel() * 4) if before else None,
        "settings": SMALLER.get(name, {}),
        "stack_mib": deltas.numel() * 4 / (1 << 20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", help="default: all but flower")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--clients", type=count, default=100)
    parser.add_argument("--limit", type=float, default=45, help="seconds for two rounds of a rule")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=json_file, help="a JSON file")
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(one(chosen.rules[0], chosen.model, chosen.clients)))
        return
    from fl_sim.composing import choices, conf_folder

    there = [*choices("aggregator", [conf_folder()])]
    for name in chosen.rules:
        if name not in there:
            parser.error(f"{name}: no such rule (there are {', '.join(there)})")
    rows: list[dict[str, Any]] = []
    for name in chosen.rules or [each for each in there if each != "flower"]:
        command = [sys.executable, __file__, name, "--one", "--model", chosen.model, "--clients", str(chosen.clients)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=chosen.limit)
        except subprocess.TimeoutExpired:
            rows.append({"rule": name, "failed": f"not through in {chosen.limit:g} seconds"})
            print(f"{name:18s} {rows[-1]['failed']}", flush=True)
            continue
        if done.returncode:
            rows.append({"rule": name, "failed": done.stderr.strip().splitlines()[-1] if done.stderr else "killed"})
            print(f"{name:18s} failed: {rows[-1]['failed']}", flush=True)
            continue
        rows.append(row := json.loads(done.stdout.splitlines()[-1]))
        extra = "" if row["extra_over_stack"] is None else f"{row['extra_over_stack']:6.2f} of the stack besides"
        print(f"{name:18s} {row['seconds']:8.2f} s  {row['cpu_seconds']:8.2f} CPU s {extra}", flush=True)
    store(chosen.output, rules=rows)


if __name__ == "__main__":
    main()
