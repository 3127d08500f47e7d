"""Runs as a table for pandas."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fl_sim.errors import ConfigError
from fl_sim.report.cases import IGNORED_CHOICES, Case, understood
from fl_sim.report.reading import Run, Unread, read_runs

if TYPE_CHECKING:
    import pandas

RUN = "run"
DESCRIBES = ("paper", "fidelity", "_target_")


def frame(folders: Sequence[str | os.PathLike[str]], events: str = RUN) -> pandas.DataFrame:
    """See `fl_sim.load_runs`."""
    try:
        import pandas  # imported late: only this needs it
    except ImportError as error:
        raise ImportError("fl_sim.load_runs needs pandas: pip install 'fl-sim[pandas]'") from error
    runs, cases, unread = list[Run](), list[list[Case]](), list[str]()
    for found in read_runs(folders):
        own = found if isinstance(found, Unread) else understood(found, len(runs))
        if isinstance(own, Unread):
            unread.append(f"{own.folder}: {own.reason}")
        elif isinstance(found, Run):
            runs.append(found)
            cases.append(own)
    if unread:
        warnings.warn(f"left out {'; '.join(unread)}", stacklevel=3)
    return pandas.DataFrame(_cases(runs, cases) if events == RUN else _events(runs, events))


def _cases(runs: Sequence[Run], cases: Sequence[Sequence[Case]]) -> list[dict[str, Any]]:
    """A row for each case: a federated run, a victim, an eraser's result on a victim."""
    rows = []
    for run, own in zip(runs, cases, strict=True):
        for case in own:
            values = typed(run.config)
            chosen = {key: case.keys[key] for key in ("eraser",) if key in case.keys}
            if case.keys.get("eraser") != values.get("eraser"):  # its keys are not those of the run's own eraser
                values = {key: value for key, value in values.items() if not key.startswith("eraser.")}
            rows.append(_identity(run, case.kind) | values | chosen | dict(case.measures))
    return rows


def _events(runs: Sequence[Run], kind: str) -> list[dict[str, Any]]:
    """A row for each event of a kind, with the run's choices and the keys that vary over the runs."""
    kinds = sorted({event["event"] for run in runs for event in run.events})
    if runs and kind not in kinds:
        raise ConfigError("events", kind, f"must be {RUN}, or an event of these runs: {', '.join(kinds)}")
    configs = [typed(run.config) for run in runs]
    keys = {key: None for config in configs for key in config}
    # Compared as text: lists are not hashable, and 1 and True are not the same.
    varied = {key for key in keys if "." not in key or len({repr(config.get(key)) for config in configs}) > 1}
    rows = []
    for run, config in zip(runs, configs, strict=True):
        shared = _identity(run) | {key: value for key, value in config.items() if key in varied}
        # What an event calls as a key is called (`eraser`, `seconds`) is the event's.
        rows += [shared | {k: v for k, v in e.items() if k != "event"} for e in run.events if e["event"] == kind]
    return rows


def _identity(run: Run, kind: str | None = None) -> dict[str, Any]:
    own = {} if kind is None else {"kind": kind}
    return {"folder": str(run.folder), **own, "finished": run.finished, "command": shlex.join(run.argv)}


def typed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's keys with their values as they are; a group's own key holds its choice."""
    found = {group: choice for group, choice in config["choices"].items() if group not in IGNORED_CHOICES}
    for key, value in config.items():
        if isinstance(value, Mapping):
            if key != "choices":
                found |= _typed(f"{key}.", value)
        else:
            found[key] = value
    return found


def _typed(prefix: str, section: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            found |= _typed(f"{prefix}{key}.", value)
        elif key not in DESCRIBES:
            found[f"{prefix}{key}"] = value
    return found
