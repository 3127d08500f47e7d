"""What a dashboard shows of a run: the numbers of its events by name and step, and its configuration as flat keys."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fl_sim.schema import META

LEFT_OUT = ("event", "round", "epoch", "client", "client_accs")
"""Fields that say where or who, and one with a number for each client, whose mean and minimum are there."""


@dataclass(frozen=True)
class Scalar:
    """One point of a curve."""

    tag: str
    step: int
    value: float


def scalars(event: Mapping[str, Any]) -> Iterator[Scalar]:
    """The numbers of an event of `metrics.jsonl`; what is unknown, NaN or infinite is left out.

    `round/acc`, `erase/asr_before`, ... by round; `central/<method>/acc` by epoch; what became of each eraser of a
    centralized run as `erasers/<name>/acc`, ...; `detection/<model>/<detector>/auroc`.
    """
    prefix, step = _place(event)
    for name, value in event.items():
        if name not in LEFT_OUT:
            for tag, number in _numbers(f"{prefix}/{name}", value):
                yield Scalar(re.sub(r"[^\w\-. /]", "_", tag), step, number)


def _place(event: Mapping[str, Any]) -> tuple[str, int]:
    """Under which name an event's numbers stand, and at which step."""
    kind, round_ = str(event["event"]), int(event.get("round") or 0)
    if kind == "central":
        return f"central/{event['method']}", int(event["epoch"])
    if kind == "erase" and not round_:
        return f"erasers/{event['eraser']}", 0
    if kind == "detection":
        return f"detection/{event['model']}/{event['detector']}", round_
    return kind, round_


def _numbers(tag: str, value: object) -> Iterator[tuple[str, float]]:
    if isinstance(value, (bool, int, float)):
        if math.isfinite(value):
            yield tag, float(value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(f"{tag}/{key}", part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, part in enumerate(value):
            yield from _numbers(f"{tag}/{index}", part)


def mark(event: Mapping[str, Any]) -> tuple[str, str] | None:
    """What an event says in words, if it does: a heading and a sentence. Erasings, and clients that came to nothing."""
    if event["event"] == "erase":
        change = ", ".join(
            f"{key.upper()} {_shown(event.get(f'{key}_before'))} → {_shown(event.get(key))}" for key in ("acc", "asr")
        )
        refused = "" if event.get("accepted", True) else f"; refused: {event.get('reason')}"
        return "erasings", f"{event['eraser']}: {change}{refused}"
    if event["event"] == "client_failed":
        return "clients that failed", f"client {event['client']}: {event['reason']}"
    if event["event"] == "client_refused":
        return "updates refused", f"client {event['client']} ({event.get('kind')}): {event['reason']}"
    return None


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def settings(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A configuration as flat keys: a group's own holds its choice, the others are dotted. Lists and null are text."""
    chosen = {str(group): str(choice) for group, choice in config["choices"].items() if choice is not None}
    return chosen | dict(_flat({key: value for key, value in config.items() if key != "choices"}, ""))


def _flat(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, bool | int | float | str]]:
    for key, value in section.items():
        if key in (*META, "_target_"):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
