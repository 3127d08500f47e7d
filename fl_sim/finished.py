"""What a finished run says of itself, checked before it is shown: `summary.json` may have been edited or spoiled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fl_sim.errors import FolderError
from fl_sim.folder import read_json

Kinds = Mapping[str, str]
"""By key: what kind of value it must have. One with a question mark may be missing or null."""
SCORES = {"acc": "number?", "asr": "number?"}
BEFORE = {"acc_before": "number?", "asr_before": "number?"}
MEASURED = SCORES | {"acc_non_target": "number?", "ra": "number?", "der": "number?", "seconds": "number?"}
FEDERATED = {"rounds": "whole", "seconds": "number", "acc_max": "number?", "asr_max": "number?"} | SCORES
ERASING = {"eraser": "text", "accepted": "flag", "round": "whole"} | SCORES | BEFORE
ERASED = {"eraser": "text"} | MEASURED
DETECTED = {"model": "text", "detector": "text", "auroc": "number?", "seconds": "number"}
INTERVAL = {"auroc_low": "number?", "auroc_high": "number?", "tpr_at_fpr_5": "number?"}


def read_summary(path: Path, central: bool) -> dict[str, Any]:
    """The summary of a finished run, if it holds all that is shown of it."""
    summary = read_json(path)
    wrong = _fault(summary, MEASURED if central else FEDERATED)
    key, kinds = ("erasers", ERASED) if central else ("erasings", ERASING)
    wrong = wrong or _fault_in_list(key, summary.get(key), kinds)
    wrong = wrong or _fault_in_list("detections", summary.get("detections", []), DETECTED)
    wrong = wrong or _first(fault_in_detection(each) for each in summary.get("detections", []))
    if wrong is not None:
        raise FolderError(f"can't read {path}: it is damaged, {wrong}")
    return summary


def fault_in_result(event: Mapping[str, Any]) -> str | None:
    """What is wrong with an eraser's result on a centralized victim; None if nothing is."""
    return _fault(event, ERASED)


def fault_in_detection(event: Mapping[str, Any]) -> str | None:
    """What is wrong with a detector's result; None if nothing is."""
    return _fault(event, DETECTED) or _fault(event, {"reason": "text"} if event.get("auroc") is None else INTERVAL)


def _fault(content: Mapping[str, Any], kinds: Kinds) -> str | None:
    return _first(_fault_of(key, content.get(key), kind) for key, kind in kinds.items())


def _fault_in_list(key: str, entries: object, kinds: Kinds) -> str | None:
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        return f"its {key} are not a list of results"
    wrong = _first(_fault(each, kinds) for each in entries)
    return None if wrong is None else f"{wrong} in its {key}"


def _fault_of(key: str, value: object, kind: str) -> str | None:
    if value is None:
        return None if kind.endswith("?") else f"it lacks {key!r}"
    flag = isinstance(value, bool)
    fits = {
        "number": isinstance(value, (int, float)) and not flag,
        "whole": isinstance(value, int) and not flag,
        "text": isinstance(value, str),
        "flag": flag,
    }
    return None if fits[kind.rstrip("?")] else f"{key!r} is {str(value)[:40]!r}"


def _first(faults: Iterable[str | None]) -> str | None:
    return next((fault for fault in faults if fault is not None), None)
