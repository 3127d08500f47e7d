"""The cross of data × model × partition: everything that a run stands on works with everything else.

Data sets that would have to be downloaded are stood in for by random images of their shape, classes and labels.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from toys import seeded

from fl_sim import build, execution
from fl_sim.composing import choices, compose_config, conf_folder
from fl_sim.data.dataset import Dataset
from fl_sim.samples import Samples

NAMES = {group: list(choices(group, [conf_folder()])) for group in ("data", "model", "partition")}
OFFLINE = ("digits", "synthetic")
CLASSES = {"cifar100": 100, "emnist": 47, "gtsrb": 43, "image_folder": 2}
CROSS = list(itertools.product(*NAMES.values()))
SMALL = {"cnn": ["model.width=4"], "vit_tiny": ["model.depth=3", "model.width=24"]}
"""Knobs that make a network quick; the others are as they are."""


def toy(source: Any) -> Dataset:
    """Noise in the shape and with the classes of a data set: 40 training and 20 test images, or two and one a class."""
    facts = source.facts

    def part(each: int) -> Samples:
        labels = torch.arange(facts.classes).repeat(each)
        return Samples(
            torch.randint(0, 256, (len(labels), *facts.shape), generator=seeded(each), dtype=torch.uint8), labels
        )

    return Dataset(part(max(2, 40 // facts.classes)), part(max(1, 20 // facts.classes)))


def compose(data: str, model: str, partition: str, root: Path) -> dict[str, Any]:
    words = [f"data={data}", f"model={model}", f"partition={partition}", "eraser=none", "attack.boost=1", "rounds=2"]
    words += ["clients=4", "clients_per_round=2", "client.epochs=1", "threat.fraction=0.25", "client.lr=0.01"]
    words += ["data.clean_fraction=0", *SMALL.get(model, [])]
    if partition == "pathological":
        words.append(f"partition.classes_per_client={CLASSES.get(data, 10)}")
    if data == "digits":
        words.append("data.subset=0.05")
    if data == "synthetic":
        words += ["data.samples=40", "data.test_samples=20"]
    if data == "image_folder":
        for split, name in itertools.product(("train", "test"), "ab"):
            (root / split / name).mkdir(parents=True)
            for number in range(20):
                (root / split / name / f"{number}.png").touch()
        words += [f"data.root={root}", "data.image_size=16"]
    return compose_config(words)


def train(data: str, model: str, partition: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    config = compose(data, model, partition, folder / "pictures")
    parts = build.build(config)
    if data not in OFFLINE:
        patch.setattr(type(parts.data), "load", toy)
    build.world_of.cache_clear()
    (folder / "run").mkdir()
    tiny.draw_nothing(patch)
    execution.start(config, folder / "run", ["fl-sim", "run"])
    rounds = tiny.events(folder / "run", "round")
    assert [event["round"] for event in rounds] == [1, 2]
    for event in rounds:
        assert math.isfinite(event["train_loss"])
        assert math.isfinite(event["loss"])
        assert event["asr"] is not None
    world = execution.prepare(config)
    assert sum(len(share) for share in world.shares) == len(world.train)
    assert rounds[0]["loss"] != rounds[1]["loss"]


def quick() -> list[tuple[str, str, str]]:
    """Every data set once, the small models and the partitions taking turns; tests/test_run.py runs the large ones."""
    turns = (itertools.cycle(each) for each in (("cnn", "wrn_16_1", "vit_tiny"), NAMES["partition"]))
    return list(zip(NAMES["data"], *turns, strict=False))


@pytest.mark.parametrize(("data", "model", "partition"), quick())
def test_some_of_the_cross_trains(
    data: str, model: str, partition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds with an attacker: finite losses, a score, every sample with a client, and a model that moves."""
    train(data, model, partition, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "model", "partition"), [row for row in CROSS if row not in quick()])
def test_all_of_the_cross_trains(
    data: str, model: str, partition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for the rest of it."""
    train(data, model, partition, tmp_path, monkeypatch)


def test_the_quick_part_leaves_nothing_out() -> None:
    """Each data set and each partition is in it, and models of all three kinds."""
    assert {row[0] for row in quick()} == set(NAMES["data"])
    assert {row[2] for row in quick()} == set(NAMES["partition"])
    assert len({row[1] for row in quick()}) == 3
    assert len(CROSS) == math.prod(map(len, NAMES.values())) >= 300
