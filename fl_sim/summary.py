"""What a finished run amounts to: `summary.json`, the short table and the curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_sim.folder import write_json
from fl_sim.tracking import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Events = Sequence[dict[str, Any]]
CURVES = "curves.png"
SUMMARY = "summary.json"
# Two colours that remain distinct for colour-blind readers and in grey (Okabe & Ito 2008).
ACC_COLOUR, ASR_COLOUR = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Curves:
    """The measured rounds of a run, and its erasings."""

    rounds: list[int]
    acc: list[float]
    asr: list[float | None]
    erasings: Events
    central: Events
    """The epochs of the centralized victim beside the run."""
    baselines: Events
    """What centralized erasers made of that victim."""

    @classmethod
    def of(cls, events: Events) -> Curves:
        measured = [event for event in events if event["event"] == "round" and event.get("acc") is not None]
        return cls(
            rounds=[event["round"] for event in measured],
            acc=[event["acc"] for event in measured],
            asr=[event["asr"] for event in measured],
            erasings=[event for event in events if event["event"] == "erase" and event["round"]],
            central=[event for event in events if event["event"] == "central" and event["method"] == "victim"],
            baselines=[event for event in events if event["event"] == "erase" and not event["round"]],
        )


def summarise(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Write `summary.json` and `curves.png` from `metrics.jsonl`; returns the summary."""
    events = list(read_metrics(folder))
    rounds = [event for event in events if event["event"] == "round"]
    curves = Curves.of(events)
    attacked = [value for value in curves.asr if value is not None]
    summary = identity | {
        "rounds": len(rounds),
        "acc": curves.acc[-1],
        "asr": curves.asr[-1],
        "asr_max": max(
            [*attacked, *(e["asr_before"] for e in curves.erasings if e["asr_before"] is not None)], default=None
        ),
        "acc_max": max(curves.acc),
        "erasings": [
            {key: value for key, value in event.items() if key != "event"}
            | {"rounds_until_back": rounds_until_back(event, curves)}
            for event in curves.erasings
        ],
        "seconds": sum(event["seconds"] for event in rounds),
        "erasing_seconds": sum(event["seconds"] for event in curves.erasings),
    }
    if any("refused" in event for event in rounds):
        summary["refused"] = sum(event.get("refused", 0) for event in rounds)
        summary["skipped"] = sum(event.get("skipped", False) for event in rounds)
    detections = [
        {key: value for key, value in e.items() if key != "event"} for e in events if e["event"] == "detection"
    ]
    if detections:
        summary["detections"] = detections
    if curves.baselines:
        summary["baselines"] = [{key: value for key, value in e.items() if key != "event"} for e in curves.baselines]
    draw(curves, folder / CURVES, identity)
    write_json(folder / SUMMARY, summary)
    return summary


def rounds_until_back(erasing: dict[str, Any], curves: Curves) -> int | None:
    """How long an erasing lasted: rounds until ASR was measured above half of what it was before.

    What the next erasing found still counts. 0 if it never fell below that; None if it did not come back, or if nothing
    was erased: no ASR, or a refused model.
    """
    before, start = erasing["asr_before"], erasing["round"]
    if not before or not erasing["accepted"]:
        return None
    later = [event for event in curves.erasings if event["accepted"] and event["round"] > start]
    end = min((event["round"] for event in later), default=math.inf)
    points = [(start, erasing["asr"])]
    points += [(t, asr) for t, asr in zip(curves.rounds, curves.asr, strict=True) if start < t < end]
    points += [(end, event["asr_before"]) for event in later if event["round"] == end]
    return next((t - start for t, asr in points if asr is not None and asr > before / 2), None)


def draw(curves: Curves, path: Path, identity: dict[str, Any]) -> None:
    """ACC and ASR by round; at each erasing both drop or rise vertically from before to after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported late: it takes half a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    before = {event["round"]: event for event in curves.erasings}
    _line(axes, curves.rounds, curves.acc, before, "acc_before", ACC_COLOUR, "ACC (clean accuracy)")
    _line(axes, curves.rounds, curves.asr, before, "asr_before", ASR_COLOUR, "ASR (attack success)")
    for index, (t, event) in enumerate(sorted(before.items())):
        label = f"erasing ({event['eraser']})" if not index else None
        style = ":" if event["accepted"] else (0, (1, 4))
        axes.axvline(t, color="0.45", linestyle=style, linewidth=1.2, label=label, zorder=0)
        if not event["accepted"]:
            axes.text(t, 1.02, "refused", ha="center", va="bottom", fontsize=8, color="0.35")
    axes.set_ylim(-0.03, 1.08)
    last = max(curves.rounds)
    room = _beside(axes, curves, last)
    axes.set_xlim(min(0.5, curves.rounds[0]), last + 0.02 * last + 0.5 + room)
    axes.set_xlabel("round")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("share of test images")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    choices = identity.get("choices", {})
    parts = [choices.get(group) for group in ("data", "model", "attack", "trigger", "aggregator", "eraser")]
    axes.set_title(" · ".join(str(part) for part in parts if part) + f" · seed {identity.get('seed')}", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def _beside(axes: Axes, curves: Curves, last: int) -> float:
    """The centralized victim over the same budget, dashed, and its erasers to the right; the room that they take."""
    if not curves.central:
        return 0.0
    epochs = curves.central[-1]["epoch"]
    at = [last * event["epoch"] / epochs for event in curves.central]
    for key, colour in (("acc", ACC_COLOUR), ("asr", ASR_COLOUR)):
        label = f"{key.upper()}, centralized"
        axes.plot(
            at, [event[key] for event in curves.central], "--", color=colour, alpha=0.6, linewidth=1.2, label=label
        )
    step = max(0.05 * last, 0.5)
    for number, event in enumerate(curves.baselines, start=1):
        x = last + number * step
        for key, colour in (("acc", ACC_COLOUR), ("asr", ASR_COLOUR)):
            if event[key] is not None:
                axes.plot([x], [event[key]], "D", color=colour, markersize=5)
        axes.text(x, 0.5, event["eraser"], rotation=90, ha="center", va="center", fontsize=7, color="0.35")
    return step * (len(curves.baselines) + 0.5)


def _line(
    axes: Axes,
    rounds: Sequence[int],
    values: Sequence[float | None],
    erasings: dict[int, dict[str, Any]],
    before: str,
    colour: str,
    label: str,
) -> None:
    points = [
        (t, y)
        for t, value in zip(rounds, values, strict=True)
        for y in (erasings.get(t, {}).get(before), value)
        if y is not None
    ]
    axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.8, marker="o", markersize=3)
