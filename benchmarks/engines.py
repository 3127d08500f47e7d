"""How long a round takes: the same federated averaging by a bare PyTorch loop, by fl-sim's engines and by Flower's own.

    python benchmarks/engines.py                          # both cases, everything that is installed
    python benchmarks/engines.py digits --repeats 5 -o engines.json

Each way runs in a fresh process; repetitions are interleaved, so that what else the machine does meets all alike.
All do the same arithmetic: the same network, clients, samples, batches and steps, one torch thread a process or
worker. Wall seconds are what users wait for; CPU seconds (of the process and all its workers) hardly depend on what
else is running. Memory is the most private memory that each process of a way ever held, summed, and the shared memory
at the end; libraries' code, which all have in common, is left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from storing import count, json_file

COMMON = (
    "attack=none",
    "eraser=none",
    "partition=iid",
    "client.epochs=1",
    "checkpoint.every=1000000",
    "eval.every=1000000",
)
CASES = {
    "digits": ("data=digits", "clients=100", "clients_per_round=100", *COMMON),
    "wrn": (
        *(
            "data=synthetic",
            "data.image_size=32",
            "data.clean_fraction=0",
            "data.samples=5000",
            "data.test_samples=100",
        ),
        *("model=wrn_16_1", "clients=10", "clients_per_round=10", "client.batch_size=50", *COMMON),
    ),
}
"""100 clients of about 13 samples, a small CNN; and 10 clients of 500 samples, WRN-16-1 at 32×32."""
WAYS = {
    "bare": (),
    "inprocess_1": ("engine.workers=1",),
    "inprocess_2": ("engine.workers=2",),
    "batched": ("engine=batched", "engine.workers=2"),
    "ray": ("engine=ray", "engine.workers=2"),
    "stock_flower": (),
    "tutorial_flower": ("engine.workers=2",),
}
NEEDED = {"ray": ("ray",), "stock_flower": ("ray",), "tutorial_flower": ("ray", "flwr_datasets")}
"""Modules that a way needs; the extra `bench` brings them."""
ROUNDS = {"digits": 12, "wrn": 2}
REPEATS = {"digits": 2, "wrn": 1}
RATIOS = (
    ("inprocess_1", "bare"),
    ("inprocess_2", "bare"),
    ("batched", "bare"),
    ("batched", "inprocess_2"),
    ("ray", "inprocess_2"),
    ("stock_flower", "inprocess_1"),
    ("stock_flower", "inprocess_2"),
    ("stock_flower", "batched"),
    ("stock_flower", "ray"),
    ("tutorial_flower", "inprocess_1"),
    ("tutorial_flower", "inprocess_2"),
    ("tutorial_flower", "batched"),
)


def family() -> dict[int, list[str]]:
    """What /proc/PID/stat says, from the parent's number on, of this process and all that descend from it."""
    fields: dict[int, list[str]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields[int(stat.parent.name)] = stat.read_text().rpartition(")")[2].split()[1:]
        except OSError:  # it has ended meanwhile
            continue

    def ours(pid: int) -> bool:
        while pid in fields and pid != os.getpid():
            pid = int(fields[pid][0])
        return pid == os.getpid()

    return {pid: said for pid, said in fields.items() if ours(pid)}


def cpu_seconds() -> float:
    """CPU time of this process and all that descend from it."""
    tick = os.sysconf("SC_CLK_TCK")
    others = (said for pid, said in family().items() if pid != os.getpid())
    # /proc counts in hundredths; of this process alone the clock knows more.
    return time.process_time() + sum((int(said[10]) + int(said[11])) / tick for said in others)


def most_memory() -> float:
    """MiB: the most private memory that each process of the family has held, and what they share, once."""
    private, shared = 0, [0]
    for pid in family():
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        kib = {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines) if "kB" in value}
        shared.append(kib.get("RssShmem", 0))
        private += kib.get("VmHWM", 0) - kib.get("RssFile", 0) - kib.get("RssShmem", 0)
    return (private + max(shared)) / 1024


class Clocks(NamedTuple):
    """What the clocks say between two rounds; reading them takes milliseconds, which are in neither round."""

    ended: float
    ended_cpu: float
    begins: float
    begins_cpu: float
    memory: float


def clocks() -> Clocks:
    """To be called at the end of each round."""
    ended, started = time.time(), time.process_time()
    cpu, memory = cpu_seconds(), most_memory()
    spent = time.process_time() - started
    return Clocks(ended, cpu, time.time(), cpu + spent, memory)


# One way, in a process of its own ------------------------------------------------------------------------------------


def bare(config: dict[str, Any]) -> list[Clocks]:
    """What a careful person would write without any framework: in place, fused, channels last."""
    import torch
    from torch.nn import functional as F

    from fl_sim.build import to_text, world_of

    torch.set_num_threads(1)
    world = world_of(to_text(config))
    plan, model = config["client"], world.new_model()
    samples = [world.samples_of(client) for client in range(config["clients"])]
    weights = [len(each) / sum(map(len, samples)) for each in samples]
    rng, device = torch.Generator().manual_seed(0), samples[0].labels.device
    rough = torch.autocast(device.type, torch.bfloat16, enabled=config["engine"]["precision"] == "bfloat16")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ended = []
    for _ in range(config["rounds"]):
        mean = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in state.items()}
        for each, weight in zip(samples, weights, strict=True):
            model.load_state_dict(state)
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=plan["lr"], fused=True)
            for _ in range(plan["epochs"]):
                for at in torch.randperm(len(each), generator=rng).to(device).split(plan["batch_size"]):
                    optimizer.zero_grad()
                    with rough:
                        loss = F.cross_entropy(model(each.images[at].float().div_(255)), each.labels[at])
                    loss.backward()
                    optimizer.step()
            for name, tensor in model.state_dict().items():
                mean[name].add_(tensor, alpha=weight)
        state = {name: tensor.to(state[name].dtype) for name, tensor in mean.items()}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ended.append(clocks())
    return ended


def simulated(config: dict[str, Any]) -> list[Clocks]:
    """fl-sim itself, as `fl-sim run` executes it."""
    from fl_sim import execution
    from fl_sim.rounds import Federation

    ended = []
    original = Federation._round

    def timed(self: Federation, t: int) -> None:
        original(self, t)
        ended.append(clocks())

    Federation._round = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        execution.start(config, Path(folder), ["fl-sim", "run"])
    return ended


def stock(config: dict[str, Any]) -> list[Clocks]:
    """Flower's ClientApp and strategy with each client's samples kept as tensors, two clients at a time."""
    from fl_sim.build import to_text

    os.environ["FL_SIM_BENCHMARK"] = to_text(config)
    import stock_flower
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2, "num_gpus": 0}}
    run_simulation(stock_flower.server_app, stock_flower.client_app, config["clients"], backend_config=resources)
    return stock_flower.ended


def tutorial(config: dict[str, Any]) -> list[Clocks]:
    """Flower as its quickstart has it, data pipeline and all, two clients at a time."""
    import tutorial_flower

    return tutorial_flower.rounds(config)


def one_way(way: str, case: str, rounds: int, started: float) -> None:
    """Print, as JSON, when the first round ended and how long the others took."""
    from fl_sim.composing import compose_config

    # One round more than asked for: fl-sim's last one evaluates and saves.
    config = compose_config([*CASES[case], *WAYS[way], f"rounds={rounds + 2}"])
    execute = {"bare": bare, "stock_flower": stock, "tutorial_flower": tutorial}.get(way, simulated)
    ended = execute(config)
    pairs = list(itertools.pairwise(ended[:-1]))
    seconds = [after.ended - before.begins for before, after in pairs]
    cpu = [after.ended_cpu - before.begins_cpu for before, after in pairs]
    found = {"first": ended[0].ended - started, "seconds": seconds, "memory": ended[-1].memory}
    # CPU seconds as a mean, for they are counted in hundredths.
    print(json.dumps(found | {"cpu": sum(cpu) / len(cpu)}))


# All of them ----------------------------------------------------------------------------------------------------


def measured(way: str, case: str, rounds: int) -> dict[str, Any]:
    """One way's numbers, from a fresh process."""
    command = [sys.executable, __file__, case, "--way", way, "--rounds", str(rounds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--started", repr(time.time())], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way} on {case} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(case: str, ways: list[str], rounds: int, repeats: int) -> dict[str, Any]:
    """Medians over the repetitions; a ratio is the median of the repetitions' own ratios."""
    runs: list[dict[str, dict[str, Any]]] = []
    for repeat in range(repeats):
        runs.append({})
        for way in ways:
            runs[-1][way] = found = measured(way, case, rounds)
            each = statistics.median(found["seconds"])
            line = f"{each:8.3f} s a round {found['cpu']:8.3f} CPU s {found['memory']:6.0f} MiB, first round"
            print(
                f"{case:7s} {repeat + 1}/{repeats} {way:13s}{line} after {found['first']:5.1f} s",
                flush=True,
            )

    def round_seconds(run: dict[str, dict[str, Any]], way: str) -> float:
        return statistics.median(run[way]["seconds"])

    table = {
        way: {
            "seconds_a_round": statistics.median(round_seconds(run, way) for run in runs),
            "cpu_seconds_a_round": statistics.median(run[way]["cpu"] for run in runs),
            "first_round_after_seconds": statistics.median(run[way]["first"] for run in runs),
            "peak_mib": statistics.median(run[way]["memory"] for run in runs),
        }
        for way in ways
    }
    ratios = {
        f"{over} / {under}": {
            "wall": statistics.median(round_seconds(run, over) / round_seconds(run, under) for run in runs),
            "cpu": statistics.median(run[over]["cpu"] / run[under]["cpu"] for run in runs),
        }
        for over, under in RATIOS
        if {over, under} <= set(ways)
    }
    return {"ways": table, "ratios": ratios, "rounds": rounds, "repeats": repeats, "overrides": list(CASES[case])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="default: all that is installed")
    parser.add_argument("--rounds", type=count, help="measured rounds after the first")
    parser.add_argument("--repeats", type=count, help=f"default: {REPEATS}")
    parser.add_argument("-o", "--output", type=json_file, help="a JSON file")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.way:
        one_way(chosen.way, chosen.cases[0], chosen.rounds, chosen.started)
        return
    missing = {way: [name for name in NEEDED.get(way, ()) if importlib.util.find_spec(name) is None] for way in WAYS}
    ways = chosen.ways or [way for way in WAYS if not missing[way]]
    for way in (way for way in WAYS if missing[way] and way not in ways):
        print(f"{way} is left out: {' and '.join(missing[way])} not installed (the extra `bench` brings it)")
    load = os.getloadavg()
    cases = chosen.cases or list(CASES)
    result = {
        case: compare(case, ways, chosen.rounds or ROUNDS[case], chosen.repeats or REPEATS[case]) for case in cases
    }
    for case, found in result.items():
        for name, ratio in found["ratios"].items():
            print(f"{case:8s} {name:28s} {ratio['wall']:7.2f} (CPU {ratio['cpu']:.2f})")
    if chosen.output:
        from fl_sim.folder import provenance

        about = provenance("cpu", {}, sys.argv)
        about |= {"cores": os.cpu_count(), "threads_a_process": 1, "load_before": load, "load_after": os.getloadavg()}
        about["packages"]["ray"] = None if missing["ray"] else importlib.metadata.version("ray")
        chosen.output.write_text(json.dumps({"about": about, "cases": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
