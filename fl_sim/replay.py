"""A finished run once more: whether its configuration still gives the same numbers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fl_sim import execution
from fl_sim.composing import CHOICES, Config
from fl_sim.errors import ConfigError, FolderError
from fl_sim.folder import is_done, read_json
from fl_sim.tracking import read_metrics
from fl_sim.world import pick_device

CLOCKED = "seconds"
"""What a clock decides; all else must be the same."""


@dataclass(frozen=True)
class Replay:
    """How many events were compared, the first difference if there is one, and what is not as it was then."""

    events: int
    difference: str | None
    circumstances: Sequence[str]


def replay(folder: Path) -> Replay:
    """Execute the run's configuration in a temporary folder, and compare all its events."""
    if not folder.is_dir():
        raise FolderError(f"can't replay {folder}: no such folder")
    config = execution.read_config(folder)
    if not is_done(folder):
        raise FolderError(f"can't replay {folder}: it is not finished; first go on with fl-sim resume {folder}")
    recorded = list(read_metrics(folder))
    meta = read_json(folder / execution.META) if (folder / execution.META).exists() else {}
    words = ["fl-sim", "central" if execution.is_central(folder) else "run"]
    with tempfile.TemporaryDirectory(prefix="fl-sim-replay-") as temporary:
        # A folder of its own for victims, too: one that is found would not be trained again.
        again = Path(temporary) / "run"
        again.mkdir()
        execution.start(prepared(config, meta, Path(temporary)), again, words)
        repeated = list(read_metrics(again))
        now = read_json(again / execution.META)
    return Replay(len(recorded), first_difference(recorded, repeated), circumstances(meta, now))


def prepared(config: Config, meta: Mapping[str, Any], folder: Path) -> Config:
    """The configuration for a replay: on the device of then, if it is here, and heard by no other tracker."""
    choices = {**config[CHOICES], "tracker": "none"}
    changed = {**config, "output": str(folder), "tracker": {}, CHOICES: choices}
    device = meta.get("device")
    if isinstance(device, str):
        try:
            pick_device(device)
        except ConfigError:
            return changed  # it is told with the circumstances
        changed["device"] = device
    return changed


def circumstances(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs of versions, machine and device: the usual reasons why numbers do."""
    if not then:
        return ["the folder does not say with which versions and on which device it ran"]
    flat = [{**each, **(each["packages"] if isinstance(each.get("packages"), dict) else {})} for each in (then, now)]
    told = set(flat[1]) - {"packages", "argv", "started", "seeds", "may_vary", "batched"}
    return [
        f"{key}: then {flat[0].get(key)}, now {flat[1].get(key)}"
        for key in sorted(told)
        if flat[0].get(key) != flat[1].get(key)
    ]


def first_difference(recorded: Sequence[Mapping[str, Any]], repeated: Sequence[Mapping[str, Any]]) -> str | None:
    """Where the two first differ, in words; None if they are the same in all but what a clock decides."""
    for number, (then, now) in enumerate(zip_longest(recorded, repeated), start=1):
        if then is None or now is None:
            return f"the run has {len(recorded)} events, the replay {len(repeated)}; so far they are the same"
        for key in [*then, *(key for key in now if key not in then)]:
            if key != CLOCKED and (key not in then or key not in now or _text(then[key]) != _text(now[key])):
                where = f"line {number}, event {then.get('event')!r} of round {then.get('round')}"
                return f"{where}: {key} was {_shown(then, key)}, is {_shown(now, key)}"
    return None


def _text(value: object) -> str:
    """Values as the file has them: digit for digit, and -0.0 is not 0.0."""
    return json.dumps(value, sort_keys=True)


def _shown(event: Mapping[str, Any], key: str) -> str:
    said = _text(event[key]) if key in event else "missing"
    return said if len(said) <= 60 else f"{said[:57]}..."
