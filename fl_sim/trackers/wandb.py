"""Weights & Biases: a run of its own for each run folder."""

from __future__ import annotations

import importlib
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fl_sim.errors import require
from fl_sim.folder import write_text
from fl_sim.trackers.packages import check_installed
from fl_sim.trackers.scalars import scalars, settings

FOLDER, NAME = "wandb", "wandb_id"


@dataclass
class Wandb:
    """For Weights & Biases: by default offline, in the run folder's `wandb/`, for `wandb sync`.

    Each line of `metrics.jsonl` is a step, and curves are drawn over `round` and `epoch`. So a run that is resumed with
    `mode=online` sends again only what is not there yet.
    """

    folder: Path
    config: Mapping[str, Any]
    mode: Literal["offline", "online"] = "offline"
    project: str = "fl-sim"
    entity: str | None = None
    group: str | None = None
    """None: the run's `name`, so that a sweep is a group."""
    _run: Any = field(default=None, init=False, repr=False)
    _line: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        require(bool(self.project), "project", self.project, "must be a project's name")
        check_installed("wandb")

    def rebuild(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Write anew what the record holds; online, go on with the run that is there."""
        self.close()
        if self.mode == "offline" and (self.folder / FOLDER).exists():
            shutil.rmtree(self.folder / FOLDER)
        wandb = importlib.import_module("wandb")
        # Nothing is printed, no output captured, no code looked at: the run folder has all that.
        quiet = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
        name = str(self.config["name"])
        self._run = wandb.init(
            dir=str(self.folder),
            mode=self.mode,
            project=self.project,
            entity=self.entity,
            group=self.group or name,
            name=f"{name} {self.folder.name}",
            id=self._id(),
            resume="allow" if self.mode == "online" else None,
            config=settings(self.config),
            settings=quiet,
        )
        self._run.define_metric("*", step_metric="round")
        self._run.define_metric("central/*", step_metric="epoch")
        self._line = 0
        for event in events:
            self._write(event)

    def log(self, event: str, **fields: Any) -> None:
        self._write({"event": event} | fields)

    def end(self, summary: Mapping[str, Any]) -> None:
        for key in ("acc", "asr"):
            self._run.summary[f"final/{key}"] = summary.get(key)
        self._finish(0)

    def close(self) -> None:
        """A run that is closed before its end counts as crashed."""
        self._finish(1)

    def _finish(self, status: int) -> None:
        if self._run is not None:
            self._run.finish(exit_code=status)
            self._run = None

    def _write(self, event: Mapping[str, Any]) -> None:
        where = {key: event[key] for key in ("round", "epoch") if key in event}
        self._run.log(where | {each.tag: each.value for each in scalars(event)}, step=self._line, commit=True)
        self._line += 1

    def _id(self) -> str:
        """The same for all attempts at a run, and another when its folder is removed and the run made again."""
        path = self.folder / NAME
        if not path.exists():
            write_text(path, secrets.token_hex(8))
        return path.read_text()
