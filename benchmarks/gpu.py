"""What a GPU makes of a round: two settings by each engine and by a bare loop, in a single call.

    python benchmarks/gpu.py -o gpu.json            # on a GPU
    python benchmarks/gpu.py --small                # the same code, cut down, anywhere: that it runs, not how fast

resnet18     ResNet-18 on 32×32, 10 clients of 500 images, 2 epochs in batches of 64: the aim is 1.0 s a round
many_small   a CNN of 1.6 million parameters, 50 clients of 50 images, batches of 10: 0.15 s a round

Both in bfloat16 on synthetic images. Besides seconds a round: the share of them in which the GPU computes (kernels'
time by the profiler), how often the host waits for the GPU in one client's training, and the most memory held.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from engines import bare
from storing import count, json_file, store
from torch.profiler import ProfilerActivity, profile

from clients.local.sgd import Sgd
from fl_sim import execution
from fl_sim.build import to_text, world_of
from fl_sim.composing import compose_config
from fl_sim.rounds import Federation

COMMON = (
    *("data=synthetic", "data.image_size=32", "data.channels=3", "data.clean_fraction=0", "data.test_samples=100"),
    *("attack=none", "eraser=none", "partition=iid", "checkpoint.every=1000000", "eval.every=1000000"),
    *("engine.precision=bfloat16", "engine.workers=1"),
)
CASES = {
    "resnet18": (
        *("model=resnet18", "clients=10", "clients_per_round=10", "data.samples=5000"),
        *("client.epochs=2", "client.batch_size=64", *COMMON),
    ),
    "many_small": (
        *("model=cnn", "model.width=132", "clients=50", "clients_per_round=50", "data.samples=2500"),
        *("client.epochs=1", "client.batch_size=10", *COMMON),
    ),
}
SMALL = {
    "resnet18": ("clients=2", "clients_per_round=2", "data.samples=32", "data.image_size=8", "client.epochs=1"),
    "many_small": ("model.width=8", "clients=4", "clients_per_round=4", "data.samples=80", "data.image_size=8"),
}
AIMS = {"resnet18": 1.0, "many_small": 0.15}
WAYS = {
    "inprocess": ("engine=inprocess",),
    "inprocess, not deterministic": ("engine=inprocess", "engine.deterministic=false"),
    "inprocess, captured": ("engine=inprocess", "engine.capture=true"),
    "inprocess, captured, not deterministic": (
        *("engine=inprocess", "engine.capture=true"),
        "engine.deterministic=false",
    ),
    "batched": ("engine=batched", "engine.clients=50"),
}
"""A network without a batched form of its own, or on a machine where stacks are refused, says so."""
WARM = 2
"""Rounds before those that count."""


def waiting(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Watch:
    """Times the rounds of a run; profiles one of them, and counts in another how often the host waits."""

    def __init__(self, rounds: int, device: torch.device) -> None:
        self.seconds: list[float] = []
        self.busy: float | None = None
        self.waits: float | None = None
        self._profiled, self._counted = WARM + rounds + 1, WARM + rounds + 2
        self._device = device
        self._cuda = device.type == "cuda"

    def around(self, original: Callable[..., None], federation: Federation, t: int) -> None:
        waiting(self._device)
        started = time.perf_counter()
        if t == self._profiled and self._cuda:
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                original(federation, t)
                waiting(self._device)
            kernels = sum(event.self_device_time_total for event in seen.key_averages()) / 1e6
            self.busy = kernels / (time.perf_counter() - started)
        elif t == self._counted and self._cuda:
            self._count(original, federation, t)
        else:
            original(federation, t)
            waiting(self._device)
            if WARM < t < self._profiled:
                self.seconds.append(time.perf_counter() - started)

    def _count(self, original: Callable[..., None], federation: Federation, t: int) -> None:
        update, found = Sgd.update, list[int]()

        def counting(client: Sgd, *given: Any) -> Any:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    result = update(client, *given)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found.append(sum("synchroniz" in str(each.message) for each in said))
            return result

        Sgd.update = counting  # type: ignore[method-assign]
        try:
            original(federation, t)
        finally:
            Sgd.update = update  # type: ignore[method-assign]
        self.waits = statistics.mean(found) if found else None


def simulated(config: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A run as `fl-sim run` makes it; the last of its rounds evaluates and saves, and is not counted."""
    world = world_of(to_text(config))
    watch, original = Watch(rounds, world.device), Federation._round
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    Federation._round = lambda self, t: watch.around(original, self, t)  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            execution.start(config, Path(folder), ["fl-sim", "run"])
    finally:
        Federation._round = original  # type: ignore[method-assign]
    held = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else None
    seconds = statistics.median(watch.seconds)
    return {"seconds_a_round": seconds, "busy": watch.busy, "waits_a_client": watch.waits, "bytes": held}


def measured(case: str, rounds: int, small: bool) -> dict[str, Any]:
    words = [*CASES[case], *(SMALL[case] if small else ())]
    found: dict[str, Any] = {}
    for way, extra in WAYS.items():
        config = compose_config([*words, *extra, f"rounds={WARM + rounds + 3}"])
        found[way] = simulated(config, rounds)
    ended = [each.ended for each in bare(compose_config([*words, f"rounds={WARM + rounds}"]))][WARM - 1 :]
    plain = statistics.median(after - before for before, after in itertools.pairwise(ended))
    found["bare loop"] = {"seconds_a_round": plain, "busy": None, "waits_a_client": None}
    for way, result in found.items():
        result["ratio"] = result["seconds_a_round"] / found["bare loop"]["seconds_a_round"]
        told = [
            f"{case:11s}{way:40s}{result['seconds_a_round']:8.3f} s a round  {result['ratio']:5.2f} of the bare loop"
        ]
        if result["busy"] is not None:
            told.append(f"GPU busy {result['busy']:.0%}")
        if result["waits_a_client"] is not None:
            told.append(f"{result['waits_a_client']:.1f} waits in a client's training")
        print("  ".join(told), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=count, default=5, help="how many are timed")
    parser.add_argument("--small", action="store_true", help="cut down, for a machine without a GPU")
    parser.add_argument("-o", "--output", type=json_file, help="a JSON file")
    chosen = parser.parse_args()
    if not (chosen.small or torch.cuda.is_available()):
        raise SystemExit("no GPU here; --small runs the same code cut down")
    result = {case: measured(case, chosen.rounds, chosen.small) for case in chosen.cases or CASES}
    for case in result if not chosen.small else ():
        best = min(each["seconds_a_round"] for way, each in result[case].items() if way != "bare loop")
        print(f"{case}: {best:.3f} s a round by the fastest; the aim is {AIMS[case]} s")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    store(chosen.output, device=name, small=chosen.small, aims=AIMS, cases=result)


if __name__ == "__main__":
    main()
