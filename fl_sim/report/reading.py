"""Run folders, read: each into its configuration and its events. What can't be read is told, not raised."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from fl_sim.errors import ConfigError, FolderError, RunError
from fl_sim.folder import DONE, LOADER, read_json, read_yaml_text
from fl_sim.tracking import METRICS, read_metrics

CONFIG, META = "config.yaml", "meta.json"
Event: TypeAlias = dict[str, Any]
SCORES = ("acc", "asr", "ra", "acc_before", "asr_before", "der", "seconds", "tpr", "fpr", "auroc")
"""Fields that are numbers wherever they occur, null where there is nothing to measure."""


@dataclass(frozen=True)
class Run:
    """What one run folder holds."""

    folder: Path
    central: bool
    """Whether `fl-sim central` made it."""
    config: dict[str, Any]
    meta: dict[str, Any]
    events: Sequence[Event]
    finished: bool

    @property
    def argv(self) -> list[str]:
        """The command that made it; empty if the folder does not say."""
        said = self.meta.get("argv")
        return [str(word) for word in said] if isinstance(said, list) else []


@dataclass(frozen=True)
class Unread:
    """A folder that can't be used, and why."""

    folder: Path
    reason: str


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> Iterator[Run | Unread]:
    """Every run in the folders or anywhere below them, once each, in the order of their paths."""
    seen = set[Path]()
    for given in folders:
        path = Path(given)
        if not path.is_dir():
            raise ConfigError("folder", str(given), "no such folder")
        found = 0
        for folder in run_folders(path):
            found += 1
            if folder.resolve() not in seen:
                seen.add(folder.resolve())
                yield read_run(folder)
        if not found:
            yield Unread(path, f"no run is in it: nothing below has a {METRICS} or a {CONFIG}")


def run_folders(top: Path) -> Iterator[Path]:
    """The run folders at or below `top`; hidden folders are not searched."""
    for root, below, files in os.walk(top):
        if METRICS in files or CONFIG in files:
            below.clear()
            yield Path(root)
        else:
            below[:] = sorted(name for name in below if not name.startswith("."))


def read_run(folder: Path) -> Run | Unread:
    """One folder, finished or not."""
    try:
        config = _config(folder)
        meta = _meta(folder)
        events = [_checked(event, folder) for event in read_metrics(folder)]
    except RunError as error:
        # The folder stands beside the reason already.
        return Unread(folder, str(error).replace(f"{folder}{os.sep}", ""))
    kinds = {event["event"] for event in events}
    argv = meta.get("argv")
    central = "central" in argv[1:2] if isinstance(argv, list) else "round" not in kinds and "central" in kinds
    return Run(folder, central, config, meta, events, _finished(folder, config, events))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FolderError(f"it has no {CONFIG}")
    try:
        config = yaml.load(read_yaml_text(path), Loader=LOADER)  # a safe loader: plain values only
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise FolderError(f"can't read {path}: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(config, dict) or not isinstance(config.get("choices"), dict):
        raise FolderError(f"can't read {path}: it is not a run's configuration")
    return config


def _meta(folder: Path) -> dict[str, Any]:
    """`meta.json`; a run can be read without it."""
    try:
        return read_json(folder / META)
    except RunError:
        return {}


def _checked(event: Event, folder: Path) -> Event:
    """The event, if what it counts and measures are numbers; NaN counts as nothing measured."""
    kind = event["event"]
    if not isinstance(kind, str):
        raise FolderError(f"can't read {folder / METRICS}: an event's name is {kind!r}")
    if kind in ("round", "erase") and not _whole(event.get("round")):
        raise FolderError(f"can't read {folder / METRICS}: round={event.get('round')!r} in an event {kind!r}")
    if kind == "central" and not (_whole(event.get("epoch")) and isinstance(event.get("method"), str)):
        raise FolderError(f"can't read {folder / METRICS}: an event {kind!r} lacks its epoch or its method")
    if kind == "erase" and not isinstance(event.get("eraser"), str):
        raise FolderError(f"can't read {folder / METRICS}: an event {kind!r} lacks its eraser")
    for key in SCORES:
        value = event.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FolderError(f"can't read {folder / METRICS}: {key}={value!r} in an event {kind!r} is not a number")
        if not abs(value) <= sys.float_info.max:  # NaN, infinite, or an integer beyond all floats
            event[key] = None
    return event


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _finished(folder: Path, config: dict[str, Any], events: Sequence[Event]) -> bool:
    """Whether all its rounds are there; a copy may lack the file `done`."""
    if (folder / DONE).exists():
        return True
    last = max((event["round"] for event in events if event["event"] == "round"), default=0)
    return last > 0 and last == config.get("rounds")
