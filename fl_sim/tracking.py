"""Trackers: the only writers of results."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fl_sim.errors import FolderError
from fl_sim.folder import require_file

METRICS = "metrics.jsonl"


class JsonLines:
    """`metrics.jsonl`: one JSON object a line, in plain numbers; NaN and infinity become null."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS
        if self._path.exists():
            require_file(self._path)
        self._file = self._path.open("ab")

    def log(self, event: str, **fields: object) -> None:
        line = {"event": event} | {name: plain(value) for name, value in fields.items()}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def commit(self) -> int:
        """Put everything on disk; the file's length then, for the checkpoint."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def rewind(self, length: int, finished: int = 0) -> None:
        """Forget what was written after a checkpoint; its rounds will be run again.

        What stays must be the record of the rounds that are `finished`, or nothing is changed.
        """
        content = self._path.read_bytes()
        if not 0 <= length <= len(content):
            raise FolderError(f"can't resume: {self._path} is shorter than its checkpoint says; lines were removed")
        if not _is_record(content[:length], finished):
            raise FolderError(f"can't resume: {self._path} is not what its checkpoint was written with; it was edited")
        self._file.truncate(length)
        self._file.seek(length)

    def close(self) -> None:
        self._file.close()


def _is_record(content: bytes, finished: int) -> bool:
    """Whether these are whole lines of events, among them just one for each finished round, in order."""
    try:
        events = [json.loads(line) for line in content.split(b"\n")[:-1]]
        rounds = [event["round"] for event in events if event["event"] == "round"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return rounds == [*range(1, finished + 1)] and b"\r" not in content and (not content or content.endswith(b"\n"))


def plain(value: object) -> object:
    """A value as JSON can hold it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of a run; a last line that a crash cut short is left out."""
    path = folder / METRICS
    require_file(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise FolderError(f"can't read {path}: {error.strerror}") from error
    for number, line in enumerate(lines[:-1], start=1):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FolderError(f"can't read {path}: line {number} is not JSON") from error
        if not isinstance(event, dict) or "event" not in event:
            raise FolderError(f"can't read {path}: line {number} is not an event")
        yield event
