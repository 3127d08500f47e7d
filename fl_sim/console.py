"""Live progress in a terminal, plain lines when piped."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

RECENT = 10


def warn(text: str) -> None:
    """Tell on stderr of something that went wrong and stops nothing."""
    tell(f"fl-sim: {text}")


def tell(text: str) -> None:
    """Say on stderr what stands already as it should be read."""
    print(text, file=sys.stderr)


class Progress:
    """Shows each round's ACC and ASR and the time left; a tracker like any other."""

    def __init__(self, rounds: int, *, title: str = "", stream: TextIO | None = None) -> None:
        self._rounds, self._title = rounds, title
        self._first: int | None = None
        self._console = Console(file=stream or sys.stdout, highlight=False, markup=False)
        self._live: Live | None = None
        self._rows: deque[tuple[str, str]] = deque(maxlen=RECENT)
        self._started = time.perf_counter()
        self._status = "starting"

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def log(self, event: str, **fields: Any) -> None:
        if event == "round":
            self._first = self._first or fields["round"]  # a resumed run does not begin with round 1
            done = fields["round"] - self._first + 1
            left = (time.perf_counter() - self._started) / done * (self._rounds - fields["round"])
            self._status = f"round {fields['round']}/{self._rounds}"
            measured = f"ACC {shown(fields['acc'])}  ASR {shown(fields['asr'])}" if "acc" in fields else "not evaluated"
            attackers = f"{fields['malicious']} of {fields['clients']} malicious"
            attackers += f"  {fields['refused']} refused" if fields.get("refused") else ""
            attackers += "  SKIPPED: below the quorum" if fields.get("skipped") else ""
            self._say(f"{self._status:>15}  {measured}  {attackers}  {duration(left)} left", "")
        elif event == "erase":
            change = (
                f"ACC {shown(fields['acc_before'])} → {shown(fields['acc'])}  "
                f"ASR {shown(fields['asr_before'])} → {shown(fields['asr'])}  {fields['seconds']:.1f} s"
            )
            verdict = "" if fields["accepted"] else f"  REFUSED: {fields['reason']}"
            self._say(
                f"{'erasing':>15}  {fields['eraser']}  {change}{verdict}", "green" if fields["accepted"] else "red"
            )
        elif event == "detection":
            self._say(f"{'detection':>15}  {detection_line(fields)}  {fields['seconds']:.1f} s", "")
        elif event == "client_failed":
            self._say(f"{'warning':>15}  client {fields['client']} failed: {fields['reason']}", "red")

    def _say(self, line: str, style: str) -> None:
        if self._live is None:
            print(line, file=self._console.file, flush=True)
        else:
            self._rows.append((line, style))
            self._live.update(self._table())

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_row(Text(f"{self._title}  {self._status}".strip(), style="bold"))
        for line, style in self._rows:
            table.add_row(Text(line, style=style))
        return table


class CentralProgress(Progress):
    """Shows the epochs and the erasers of a central run."""

    def __init__(self, title: str = "", *, stream: TextIO | None = None) -> None:
        super().__init__(0, title=title, stream=stream)

    def log(self, event: str, **fields: Any) -> None:
        if event != "central":
            super().log(event, **fields)
            return
        self._status = f"{fields['method']}, epoch {fields['epoch']}"
        if self._live is not None:
            self._live.update(self._table())
        elif fields["method"] == "victim":
            self._say(f"{self._status:>20}  ACC {shown(fields['acc'])}  ASR {shown(fields['asr'])}", "")


def shown(value: float | None) -> str:
    return "  –  " if value is None else f"{value:.3f}"


def detection_line(fields: Mapping[str, Any]) -> str:
    """Which detector, on which model, and how well it did."""
    about = f"{fields['detector']}, {fields['model']}"
    if fields["auroc"] is None:
        return f"{about}: no AUROC, {fields['reason']}"
    interval = f"[{shown(fields['auroc_low'])}, {shown(fields['auroc_high'])}]"
    at = f"{shown(fields['tpr_at_fpr_5'])} of the stamped images at 5 % of the clean ones"
    return f"{about}: AUROC {shown(fields['auroc'])} {interval}, {at}"


def duration(seconds: float) -> str:
    """4 s, 3:07 min or 2:15 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def final_table(summary: dict[str, Any]) -> Table:
    """The erasings and the end of a run, as a short table."""
    table = Table(title=None, title_justify="left")
    for heading in ("", "round", "ACC", "ASR"):
        table.add_column(heading, justify="left" if not heading else "right")
    for erasing in summary["erasings"]:
        name = f"{erasing['eraser']} erasing" + ("" if erasing["accepted"] else " (refused)")
        acc = f"{shown(erasing['acc_before'])} → {shown(erasing['acc'])}"
        asr = f"{shown(erasing['asr_before'])} → {shown(erasing['asr'])}"
        table.add_row(name, str(erasing["round"]), acc, asr)
    table.add_row("highest", "", shown(summary["acc_max"]), shown(summary["asr_max"]))
    table.add_row("at the end", str(summary["rounds"]), shown(summary["acc"]), shown(summary["asr"]), style="bold")
    return table
