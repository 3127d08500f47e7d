"""One display for a whole sweep: what is done, found, running and failed, and how long the rest may take."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fl_sim.console import duration, shown
from fl_sim.sweep import Outcome, Running, View
from fl_sim.tracking import METRICS

TAIL = 64 * 1024
EVERY = 60.0
"""Seconds between two plain lines about what is running."""


def last_event(folder: Path) -> dict[str, Any] | None:
    """The last round, or epoch of a centralized victim, that a run has recorded; None if there is none yet."""
    try:
        with (folder / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines[:-1]):
        try:
            event = json.loads(line)
        except ValueError:  # the tail may begin within a line
            continue
        if isinstance(event, dict) and event.get("event") in ("round", "central"):
            return event
    return None


@dataclass(frozen=True)
class Stand:
    """How far one run is: rounds done of all, and what it measured last."""

    job: tuple[str, ...]
    done: int
    rounds: int
    words: str

    @property
    def share(self) -> float:
        return self.done / self.rounds if self.rounds else 0.0

    @classmethod
    def of(cls, running: Running) -> Stand:
        last = last_event(running.folder) if running.folder is not None else None
        if last is None:
            return cls(running.job, 0, running.rounds, "starting")
        scores = f"  ACC {shown(last['acc'])}  ASR {shown(last.get('asr'))}" if last.get("acc") is not None else ""
        if last["event"] == "central":
            return cls(running.job, 0, 0, f"{last['method']}, epoch {last['epoch']}{scores}")
        return cls(running.job, last["round"], running.rounds, f"round {last['round']}/{running.rounds}{scores}")


def in_common(jobs: Sequence[Sequence[str]]) -> frozenset[str]:
    """The words that all jobs of a sweep have; none if there is only one."""
    return frozenset.intersection(*(frozenset(job) for job in jobs)) if len(jobs) > 1 else frozenset[str]()


def told_apart(job: Sequence[str], shared: frozenset[str]) -> str:
    """A job by what tells it from the others."""
    return " ".join(word for word in job if word not in shared) or " ".join(job)


class SweepProgress:
    """Counts a sweep's outcomes and shows them: live in a terminal, plain lines elsewhere."""

    def __init__(self, jobs: int, *, stream: TextIO, side_by_side: bool, shared: frozenset[str] = frozenset()) -> None:
        self._jobs, self._side_by_side, self._shared = jobs, side_by_side, shared
        self._console = Console(file=stream, highlight=False, markup=False)
        self._live: Live | None = None
        self._lock = threading.Lock()  # the live display reads on a thread of its own
        self._states: dict[tuple[str, ...], str] = {}
        self._view = View()
        self._first: dict[tuple[str, ...], float] = {}
        """How far each run was when this sweep took it up."""
        self._worked = 0.0
        """Runs that this sweep has executed, a resumed one by what it had left."""
        self._started = self._told = time.perf_counter()
        self._begun = 0

    @property
    def live(self) -> bool:
        return self._console.is_terminal

    def __enter__(self) -> SweepProgress:
        if self.live:
            self._live = Live(console=self._console, get_renderable=self._table, refresh_per_second=2, transient=True)
            self._live.start()
        elif self._shared:
            self._say(f"{self._jobs} runs of {' '.join(sorted(self._shared))}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def watch(self, view: View) -> None:
        """Take note of what is running now."""
        with self._lock:
            before, self._view = self._view, view
            stands = [Stand.of(running) for running in view.running if running.folder is not None]
            for stand in stands:
                self._first.setdefault(stand.job, stand.share)
        if self.live:
            return
        if not self._side_by_side:
            for running in view.running:
                if running.job not in {each.job for each in before.running}:
                    self._begun = min(self._begun + 1, self._jobs)
                    self._say(f"[{self._begun}/{self._jobs}] {self._name(running.job)}")
            return
        if view.held_up is not None and before.held_up is None:
            self._say(f"waiting: {view.held_up}")
        if time.perf_counter() - self._told > EVERY:
            self._say("; ".join(f"{self._name(stand.job)}: {stand.words}" for stand in stands) or "nothing is running")
            self._say(self._totals(stands))

    def ended(self, outcome: Outcome) -> None:
        """Count an outcome, and tell it where nothing is live."""
        job = self._name(outcome.job)
        if outcome.busy:
            self._tell(f"{job}: {outcome.state}; looked at again at the end")
            return
        with self._lock:
            self._states[outcome.job] = outcome.state
            refused = outcome.summary is None and outcome.job not in self._first
            if outcome.state != "found finished" and not refused:
                self._worked += 1 - self._first.get(outcome.job, 0.0)
            running = [each for each in self._view.running if each.job != outcome.job]
            self._view = View(running, self._view.held_up)
            stands = [Stand.of(each) for each in running]
        self._tell(f"[{len(self._states)}/{self._jobs}] {job}: {outcome.state}  ({self._totals(stands)})")

    def left(self, stands: Sequence[Stand]) -> float | None:
        """Seconds until all is done, by how long what has been done took; None as long as nothing has.

        Runs that wait may turn out to be finished already, so that this is rather too much than too little.
        """
        under_way = {stand.job: stand.share for stand in stands}
        worked = self._worked + sum(share - self._first.get(job, share) for job, share in under_way.items())
        if worked <= 0:
            return None
        missing = self._jobs - len(self._states) - sum(under_way.values())
        return (time.perf_counter() - self._started) / worked * max(0.0, missing)

    def _totals(self, stands: Sequence[Stand]) -> str:
        states = list(self._states.values())
        failed = sum(state.startswith("failed") for state in states)
        found = states.count("found finished")
        waiting = self._jobs - len(states) - len(stands)
        counts = {"done": len(states) - failed - found, "found finished": found, "failed": failed}
        counts |= {"running": len(stands), "waiting": max(0, waiting)}
        words = [f"{count} {name}" for name, count in counts.items() if count]
        left = self.left(stands) if len(states) < self._jobs else None
        return ", ".join([*words, *([f"about {duration(left)} left"] if left is not None else [])])

    def _table(self) -> RenderableType:
        with self._lock:
            stands = [Stand.of(running) for running in self._view.running]
            done = len(self._states) + sum(stand.share for stand in stands)
            rows = Table.grid(padding=(0, 2))
            for stand in stands:
                rows.add_row(Text(self._name(stand.job), overflow="ellipsis", no_wrap=True), Text(stand.words))
            lines: list[RenderableType] = [Text(self._totals(stands), style="bold")]
            bar = Table.grid()  # alone it would not end its line
            bar.add_row(ProgressBar(total=self._jobs, completed=done, width=60))
            lines += [bar, rows]
            lines += [Text(f"waiting: {self._view.held_up}")] if self._view.held_up is not None else []
            failed = [job for job, state in self._states.items() if state.startswith("failed")]
            lines += [Text(f"failed: {self._name(job)}", style="red") for job in failed[-5:]]
            return Group(*lines)

    def _name(self, job: tuple[str, ...]) -> str:
        return told_apart(job, self._shared)

    def _tell(self, line: str) -> None:
        if not self.live:
            self._say(line)

    def _say(self, line: str) -> None:
        self._told = time.perf_counter()
        self._console.print(line, soft_wrap=True)
