"""How trackers follow the record: rebuilt from it where a run begins or goes on, and never the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fl_sim.console import warn
from fl_sim.errors import RunError
from fl_sim.protocols import Follower, Tracker
from fl_sim.tracking import read_metrics


def rebuild(trackers: Iterable[Tracker], folder: Path) -> None:
    """Have those trackers begin that follow the record of a run folder, with what it holds."""
    for tracker in trackers:
        if isinstance(tracker, Follower):
            tracker.rebuild(read_metrics(folder))


class Guarded:
    """Hands everything on to a tracker until it fails; then warns, once, and leaves it alone.

    The numbers are safe in `metrics.jsonl`, whatever becomes of their copy.

    One that can't even begin is a `RunError`: nothing has been computed yet, so there is nothing to lose.
    """

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker, self._name = tracker, name
        self._failed = False

    def rebuild(self, events: Iterable[Mapping[str, Any]]) -> None:
        if not hasattr(self._tracker, "rebuild"):
            return
        self._failed = False
        try:
            self._tracker.rebuild(events)
        except RunError:
            raise
        except Exception as error:
            raise RunError(f"tracker={self._name} can't begin: {_line(error)}") from error

    def log(self, event: str, **fields: object) -> None:
        self._try(lambda: self._tracker.log(event, **fields))

    def end(self, summary: Mapping[str, Any]) -> None:
        if hasattr(self._tracker, "end"):
            self._try(lambda: self._tracker.end(summary))  # type: ignore[attr-defined]

    def close(self) -> None:
        if hasattr(self._tracker, "close"):
            self._try(self._tracker.close)

    def _try(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            warn(f"tracker={self._name} has failed and is told nothing more; the run goes on: {_line(error)}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
