"""Run folders made by hand, with numbers that are known beforehand; nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CHOICES = {"data": "digits", "model": "cnn", "attack": "model_replacement", "trigger": "badnets", "collusion": "none"}
DEFENSE = {"aggregator": "mean", "eraser": "none", "erasing": "every"}
DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the one in C is ten times as fast
Scores = Sequence[tuple[float, float]]


def config(seed: int, rounds: int, **sections: Any) -> dict[str, Any]:
    """A composed configuration; a group's name takes its choice, or its choice and its keys."""
    choices: dict[str, Any] = CHOICES | DEFENSE
    content: dict[str, Any] = {}
    for key, value in sections.items():
        if key in choices:
            choices[key], own = value if isinstance(value, tuple) else (value, {})
            content[key] = {"_target_": f"some.{choices[key]}", "paper": "a paper", **own}
        else:
            content[key] = value
    seeds = {"data": seed, "threat": seed, "train": seed}
    return {
        "rounds": rounds,
        "seed": seed,
        "seeds": seeds,
        "name": "made",
        "output": "runs",
        **content,
        "choices": choices,
    }


def write(
    folder: Path,
    config: Mapping[str, Any],
    events: Iterable[Mapping[str, Any]],
    argv: Sequence[str] = ("fl-sim", "run", "a=b"),
    *,
    done: bool = True,
) -> Path:
    """A run folder of this content."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.dump(dict(config), Dumper=DUMPER))
    (folder / "meta.json").write_text(json.dumps({"argv": list(argv), "device": "cpu"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if done:
        (folder / "done").touch()
    return folder


def rounds(scores: Scores, **fields: Any) -> list[dict[str, Any]]:
    """`round` events with these (ACC, ASR), a second each."""
    return [
        {"event": "round", "round": t, "acc": acc, "asr": asr, "seconds": 1.0, **fields}
        for t, (acc, asr) in enumerate(scores, start=1)
    ]


def erase(t: int, before: tuple[float, float], after: tuple[float, float], **fields: Any) -> dict[str, Any]:
    """An `erase` event, from (ACC, ASR) to (ACC, ASR), half a second long."""
    scores = {"acc_before": before[0], "asr_before": before[1], "acc": after[0], "asr": after[1]}
    return {"event": "erase", "round": t, "eraser": "nad", **scores, "seconds": 0.5, "accepted": True} | fields


def run(folder: Path, seed: int, scores: Scores, *more: Mapping[str, Any], done: bool = True, **sections: Any) -> Path:
    """A federated run with these scores by round; `more` are further events."""
    planned = sections.pop("planned", len(scores))
    return write(folder, config(seed, planned, **sections), [*rounds(scores), *more], done=done)
