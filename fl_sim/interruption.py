"""Moments in which a run must not be interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPS = (signal.SIGINT, signal.SIGTERM)
# A batch system tells with one of these that time is up, and what handles it raises SystemExit.
HELD = (*STOPS, *(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold interrupts back until the block is done.

    One that arrives inside `torch.save` would leave it as a RuntimeError about the file's position, which nobody
    could tell from a real fault.
    """
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield
        return
    held: list[int] = []
    previous = {number: signal.signal(number, lambda arrived, _frame: held.append(arrived)) for number in HELD}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if held:
            signal.raise_signal(held[0])
