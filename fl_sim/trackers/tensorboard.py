"""TensorBoard: event files in the run folder."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fl_sim.trackers.packages import check_installed
from fl_sim.trackers.scalars import mark, scalars, settings

FOLDER = "tensorboard"
FINAL = ("acc", "asr")


@dataclass
class TensorBoard:
    """For TensorBoard: event files in the run folder's `tensorboard/`, with the configuration as hyperparameters."""

    folder: Path
    config: Mapping[str, Any]
    _writer: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_installed("tensorboard")

    def rebuild(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Write anew what the record holds: an event file can't be rewound."""
        self.close()
        path = self.folder / FOLDER
        if path.exists():
            shutil.rmtree(path)
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(path))
        # At once, so that an unfinished run has its row in the table, too; `end` says how the session ended.
        for summary in self._hyperparameters()[:2]:
            self._writer.file_writer.add_summary(summary)
        for event in events:
            self._write(event)
        self._writer.flush()

    def log(self, event: str, **fields: Any) -> None:
        self._write({"event": event} | fields)
        self._writer.flush()  # a round takes seconds: whoever watches need not wait for two minutes

    def end(self, summary: Mapping[str, Any]) -> None:
        for key in FINAL:
            if summary.get(key) is not None:
                self._writer.add_scalar(f"final/{key}", summary[key], summary.get("rounds", 0))
        self._writer.file_writer.add_summary(self._hyperparameters()[2])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, event: Mapping[str, Any]) -> None:
        for scalar in scalars(event):
            self._writer.add_scalar(scalar.tag, scalar.value, scalar.step)
        said = mark(event)
        if said is not None:
            self._writer.add_text(*said, event.get("round", 0))

    def _hyperparameters(self) -> Any:
        """Three summaries: what the table of hyperparameters shows, that a session has begun, that it has ended."""
        describe = importlib.import_module("torch.utils.tensorboard.summary").hparams
        return describe(settings(self.config), {f"final/{key}": 0.0 for key in FINAL})
