"""Meetings of clients that train together, interrupted by Ctrl-C at random moments: does every thread come to its end?

`python tests/meeting_stress.py MEETINGS` prints how many ended how, as JSON, and ends with 1 if a thread was left
waiting. Training is replaced by nothing, so that a meeting takes a millisecond and most interruptions hit its inside.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import fl_sim.together.meeting as meetings
from fl_sim.training import Fitted

PATIENCE = 5.0
"""Seconds: a thread that is at work then is left for good."""


class Nothing:
    """Stands for samples, of which there is one."""

    def __len__(self) -> int:
        return 1


def held(seed: int) -> str:
    """One meeting; how it ended."""
    rng = random.Random(seed)
    visits = [rng.randint(0, 3) for _ in range(rng.randint(1, 12))]
    slots = rng.choice((1, 2, 3, 20))
    given: Any = {"epochs": 1, "batch_size": 1, "rng": None}
    nothing: Any = Nothing()

    def visit(place: int) -> int:
        for _ in range(visits[place]):
            meetings.client_fit()(nothing, nothing, nothing, **given)
        return place

    def plan(jobs: Any) -> list[list[int]]:
        return [[*range(len(jobs))][: rng.randint(2, 12)]] if len(jobs) > 2 else []

    def train(jobs: Any) -> list[Fitted | None]:
        return [rng.choice((None, Fitted(1, 0.0))) for _ in jobs]

    pool, trainers = ThreadPoolExecutor(len(visits)), ThreadPoolExecutor(min(slots, 2))
    stays = {place: partial(visit, place) for place in range(len(visits))}
    meeting = meetings.Meeting(stays, slots, pool, trainers, lambda job: job.place % 4 == 3)
    ended = "whole"
    try:
        signal.setitimer(signal.ITIMER_REAL, max(1e-6, rng.random() ** 3 * 6e-3))
        given_back = meeting.lead(plan, train)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert given_back == list(range(len(visits)))
    except KeyboardInterrupt:
        ended = "interrupted"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    pool.shutdown(wait=False)
    trainers.shutdown(wait=False)
    deadline = time.monotonic() + PATIENCE
    for thread in [*pool._threads, *trainers._threads]:
        thread.join(max(0.0, deadline - time.monotonic()))
        ended = "left waiting" if thread.is_alive() else ended
    return ended


def main(count: int) -> None:
    """A line of JSON: how often each end came."""
    setattr(meetings, "train_alone", lambda job: Fitted(1, 0.0))  # noqa: B010
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    ends = Counter[str]()
    for seed in range(count):
        try:
            ends[held(seed)] += 1
        except KeyboardInterrupt:  # it came between two meetings
            ends["late"] += 1
    print(json.dumps(ends), flush=True)
    os._exit(bool(ends["left waiting"]))  # which waits for no thread


if __name__ == "__main__":
    main(int(sys.argv[1]))
