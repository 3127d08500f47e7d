"""What scoring a model takes beside classifying its test set once: ACC and ASR should cost at most two forward passes.

    python benchmarks/evaluation.py -o evaluation.json

Scoring stamps every test image that is not of the target class, and classifies it as it is and stamped. The plain pass
is a loop over the same batches. Both are timed in turn, on the processor's clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from storing import count, json_file, store

from fl_sim.build import to_text, world_of
from fl_sim.composing import compose_config
from fl_sim.metrics import evaluate

CASES = {
    "digits": ["data=digits"],
    "wrn_16_1": [
        "data=synthetic",
        "data.image_size=32",
        "data.samples=400",
        "data.test_samples=1000",
        "model=wrn_16_1",
    ],
}


def spent(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def measured(overrides: list[str], repeats: int) -> dict[str, float]:
    world = world_of(to_text(compose_config([*overrides, "engine.server_threads=1"])))
    model = world.new_model().eval()

    @torch.no_grad()
    def plain() -> None:
        for x, _ in world.test.chunks(512):
            model(x).argmax(1)

    def scored() -> None:
        evaluate(model, world.test, world.backdoor)

    plain()  # what is allocated once is not counted
    scored()
    pairs = [(spent(scored), spent(plain)) for _ in range(repeats)]
    return {
        "scoring": statistics.median(each for each, _ in pairs),
        "forward": statistics.median(each for _, each in pairs),
        "ratio": statistics.median(one / other for one, other in pairs),
        "images": len(world.test),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=count, default=7)
    parser.add_argument("-o", "--output", type=json_file, help="a JSON file")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    result = {}
    for name, overrides in CASES.items():
        result[name] = found = measured(overrides, chosen.repeats)
        print(f"{name:10s} ACC and ASR on {found['images']} images: {found['ratio']:.2f} forward passes", flush=True)
    store(chosen.output, cases=result)


if __name__ == "__main__":
    main()
