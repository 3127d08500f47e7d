"""Runs that take a fraction of a second, and how to read what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fl_sim import execution
from fl_sim.build import CALLS
from fl_sim.composing import choices, compose_config, conf_folder
from fl_sim.rounds import Federation
from fl_sim.schema import locate

TINY = (
    "data=synthetic",
    "data.samples=300",
    "data.test_samples=100",
    "data.image_size=8",
    "data.channels=1",
    "data.classes=4",
    "model.width=4",
    "clients=6",
    "clients_per_round=4",
    "client.epochs=1",
    "threat.fraction=0.5",
    "rounds=3",
    "eraser=none",
)
"""Six clients, four a round, three rounds, on 8×8 images of four classes."""

ERASING = ("eraser=fine_tune", "eraser.epochs=1", "eraser.min_steps=4", "erasing.rounds=2")
"""Besides: an erasing after every second round."""


def tiny(*overrides: str) -> dict[str, Any]:
    """The composed configuration of a tiny run."""
    return compose_config([*TINY, *overrides])


def run(folder: Path, *overrides: str) -> Path:
    """A tiny run in a fresh folder; returns the folder."""
    folder.mkdir(parents=True)
    execution.start(tiny(*overrides), folder, ["fl-sim", "run"])
    return folder


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def interrupted(folder: Path, step: str, at: int, *overrides: str, after: bool = False) -> Path:
    """A run that ends inside a round: at the start of its `step`, or right after it."""
    folder.mkdir(parents=True)
    original = getattr(Federation, step)

    def breaking(self: Federation, t: int, *rest: Any) -> Any:
        if t == at and not after:
            raise Interrupted
        result = original(self, t, *rest)
        if t == at:
            raise Interrupted
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, step, breaking)
        with pytest.raises(Interrupted):
            execution.start(tiny(*overrides), folder, ["fl-sim", "run"])
    assert not (folder / "done").exists()
    return folder


COMPOSED = (
    *("aggregator", "eraser", "trigger", "attack", "partition", "erasing"),
    *("collusion", "client", "threat", "server_optimizer", "sampler", "detection"),
)
"""The groups whose choices are tested in all pairs, and each among others."""


def calls_of(patch: pytest.MonkeyPatch, group: str, name: str) -> list[Any] | None:
    """What a choice's own method, not a relative's, is given from now on; nothing for a choice that is no component."""
    section: Any = OmegaConf.to_container(OmegaConf.load(choices(group, [conf_folder()])[name])) or {}
    if "_target_" not in section:
        return None
    calls: list[Any] = []
    target: Any = locate(section["_target_"])
    original = getattr(target, CALLS[group])

    def spying(self: object, *given: Any, **named: Any) -> Any:
        if type(self) is target:
            calls.append(given)
        return original(self, *given, **named)

    patch.setattr(target, CALLS[group], spying)
    return calls


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """From now on a run's pictures are empty files."""
    patch.setattr("fl_sim.summary.draw", lambda curves, path, identity: path.touch())
    patch.setattr("fl_sim.execution.draw_partitions", lambda partitions, path: path.touch())
    patch.setattr("fl_sim.attention_picture._draw", lambda path, *_: path.touch())


def events(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, all or those of one event."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def chosen(folder: Path, group: str) -> str:
    """A group's choice in a run's configuration."""
    return str(OmegaConf.load(folder / "config.yaml").choices[group])


def numbers(folder: Path) -> list[dict[str, Any]]:
    """All events without what a clock decides: what "identical metrics" means."""
    return [{key: value for key, value in event.items() if key != "seconds"} for event in events(folder)]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
