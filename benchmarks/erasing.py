"""What each eraser costs beside plain fine-tuning of as many optimiser steps, and what NAD's distillation costs.

    python benchmarks/erasing.py -o erasing.json

Steps are counted while an eraser runs, wherever it takes them; then fine-tuning of as many steps on the same model,
images and batch size is timed in turn with it, and the ratio of the medians is what the table shows. An eraser may do
more than steps (invert a trigger, craft images, score a validation part): that is in its seconds and so in its ratio.
NAD's distillation stage alone, student towards a frozen teacher, is timed in turn with fine-tuning, step for step.
Seconds are the processor's, so that what else a machine does hardly counts; wall clocks stand beside them in the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from omegaconf import OmegaConf
from storing import count, json_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from fl_sim.attention import distillation
from fl_sim.augment import Augment
from fl_sim.build import component
from fl_sim.composing import choices, conf_folder
from fl_sim.errors import ConfigError
from fl_sim.folder import provenance
from fl_sim.layout import Layout
from fl_sim.models.classifier import Classifier, Compute, build_classifier
from fl_sim.protocols import Eraser, ServerContext
from fl_sim.samples import Samples
from fl_sim.training import Objective, cross_entropy, fit, sgd

SETTINGS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "digits": ("cnn", (1, 8, 8)),
    "cifar10": ("wrn_16_1", (3, 32, 32)),
}
"""A model and an image shape as in the two centralized tables."""
IMAGES, CLASSES = 256, 10
WEIGHTS = (0.5, 4.0, 16.0)


def scene(setting: str, precision: str = "float32") -> tuple[Classifier, Samples, ServerContext]:
    """A fresh model, random clean images, and a server: what is timed does not depend on what is in them."""
    name, shape = SETTINGS[setting]
    rng = torch.Generator().manual_seed(0)
    section: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "model" / f"{name}.yaml"))
    compute = Compute(precision)  # type: ignore[arg-type]

    def new_model() -> Classifier:
        mean = (0.5,) * shape[0]
        return build_classifier(component("model", section), shape, CLASSES, mean, mean, rng, compute)

    model = new_model()
    images = torch.randint(0, 256, (IMAGES, *shape), dtype=torch.uint8, generator=rng)
    clean = Samples(images, torch.arange(IMAGES) % CLASSES)
    layout = Layout.of(model)
    ctx = ServerContext(
        round=0,
        rng=rng,
        device=torch.device("cpu"),
        classes=CLASSES,
        clients=(),
        assumed_attackers=0,
        layout=layout,
        vector=layout.read(model),
        clean=clean,
        augment=Augment(crop=shape[1] // 8, flip=shape[0] == 3),
        new_model=new_model,
        fit=fit,
    )
    return model, clean, ctx


def counted(work: Callable[[], object]) -> int:
    """How many optimiser steps some work takes, whoever's optimiser takes them."""
    steps = 0

    def note(*_: object) -> None:
        nonlocal steps
        steps += 1

    hook = register_optimizer_step_post_hook(note)
    try:
        work()
    finally:
        hook.remove()
    return steps


@dataclass(frozen=True)
class Times:
    """Repeated timings of one piece of work."""

    processor: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def take(self, work: Callable[[], object]) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        work()
        self.processor.append(time.process_time() - processor)
        self.wall.append(time.perf_counter() - wall)

    @property
    def median(self) -> float:
        return statistics.median(self.processor)


def in_turn(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[Times, Times]:
    """Both timed in turn, so that whatever else the machine does meets both alike."""
    times = Times(), Times()
    for _ in range(repeats):
        times[0].take(first)
        times[1].take(second)
    return times


def tuning(model: Classifier, clean: Samples, ctx: ServerContext, steps: int, objective: Objective) -> None:
    """`steps` of SGD on a copy."""
    copy = deepcopy(model)
    rng = torch.Generator().manual_seed(1)
    augmented = clean.then(ctx.augment)
    fit(
        copy,
        augmented,
        sgd(copy, 0.01, momentum=0.9),
        epochs=0,
        batch_size=64,
        rng=rng,
        min_steps=steps,
        objective=objective,
    )


def distilling(setting: str, steps: int, repeats: int, precision: str = "float32") -> dict[str, Any]:
    """NAD's distillation stage beside as many steps of fine-tuning: batches, augmentation and optimiser alike."""
    model, clean, ctx = scene(setting, precision)
    objective = distillation(deepcopy(model).eval().requires_grad_(False), WEIGHTS)
    plain, distilled = (partial(tuning, model, clean, ctx, steps, each) for each in (cross_entropy, objective))
    plain()  # what is allocated and chosen once is not counted
    distilled()
    slow, quick = in_turn(distilled, plain, repeats)
    return {
        "steps": steps,
        "distillation": asdict(slow),
        "tuning": asdict(quick),
        "ratio": slow.median / quick.median,
    }


def erased(eraser: Eraser, model: Classifier, clean: Samples, ctx: ServerContext) -> Classifier:
    """An erasing that draws the same every time."""
    return eraser.erase(model, clean, {}, replace(ctx, rng=torch.Generator().manual_seed(2)))[0]


def shortened(section: dict[str, Any], share: float) -> dict[str, Any]:
    """The same eraser with a share of its epochs and steps: a ratio needs no more of them."""
    short = dict(section)
    for key, value in section.items():
        if isinstance(value, int) and not isinstance(value, bool) and key.endswith(("epochs", "steps")):
            short[key] = max(1, round(share * value)) if value else 0
    return short


def erasers(setting: str, names: list[str], share: float, repeats: int, precision: str) -> dict[str, Any]:
    """Each eraser's seconds and steps, and those of as many steps of fine-tuning."""
    found: dict[str, Any] = {}
    for name in names:
        model, clean, ctx = scene(setting, precision)
        section: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "eraser" / f"{name}.yaml"))
        try:
            eraser: Eraser = component("eraser", shortened(section, share))
            if hasattr(eraser, "check_model"):
                eraser.check_model(model)
            erase = partial(erased, eraser, model, clean, ctx)
            steps = counted(erase)
        except ConfigError as error:
            found[name] = {"refused": str(error)}
            print(f"  {name:<14} refused: {error}")
            continue
        own, beside = in_turn(erase, partial(tuning, model, clean, ctx, max(steps, 1), cross_entropy), repeats)
        ratio = own.median / beside.median
        found[name] = {
            "steps": steps,
            "eraser": asdict(own),
            "tuning": asdict(beside),
            "ratio": ratio if steps else None,
        }
        shown = f"{ratio:6.2f}" if steps else "     –"
        print(f"  {name:<14} {steps:>6} steps {own.median:9.3f} s {shown}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--erasers", nargs="*", default=[n for n in choices("eraser", [conf_folder()]) if n != "none"])
    parser.add_argument("--share", type=float, default=0.05, help="the share of each eraser's epochs and steps to run")
    parser.add_argument("--steps", type=count, default=20, help="of each repeat of the distillation stage")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("-o", "--output", type=json_file, default=None)
    asked = parser.parse_args()
    results: dict[str, Any] = {"meta": provenance("cpu", {}, ["benchmarks/erasing.py"])}
    results["meta"] |= {"threads": torch.get_num_threads(), "asked": {**vars(asked), "output": str(asked.output)}}
    for setting in asked.settings:
        stage = distilling(setting, asked.steps, asked.repeats, asked.precision)
        print(f"{setting}: NAD's distillation stage / as many steps of fine-tuning: {stage['ratio']:.2f}", flush=True)
        print(f"  {'eraser':<14} {'':>6}       {'seconds':>11} / fine-tuning", flush=True)
        of_each = erasers(setting, asked.erasers, asked.share, asked.repeats, asked.precision)
        results[setting] = {"distillation": stage, "erasers": of_each}
    if asked.output is not None:
        asked.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
