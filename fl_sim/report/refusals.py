"""What a server did not take: updates that were refused or never came, rounds without a quorum, erased models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fl_sim.report.reading import Event


@dataclass(frozen=True)
class Losses:
    """What became of the updates that a run's server asked for."""

    asked: int = 0
    lost: int = 0
    """Refused, never come, or of a round that came to nothing."""
    rounds: int = 0
    skipped: int = 0
    """Rounds in which nothing was aggregated."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """How many refusals for what; arrivals that nobody waited for any more are among them."""

    def __add__(self, other: Losses) -> Losses:
        reasons = Counter(self.reasons) + Counter(other.reasons)
        counts = (self.asked + other.asked, self.lost + other.lost, self.rounds + other.rounds)
        return Losses(*counts, self.skipped + other.skipped, dict(reasons))


def losses(rounds: Sequence[Event]) -> Losses | None:
    """The losses by the `round` events; None if none of them speaks of any."""
    if not any("refused" in event for event in rounds):
        return None
    asked = taken = skipped = 0
    reasons = Counter[str]()
    for event in rounds:
        clients = int(event.get("clients") or 0)
        asked += int(event.get("asked", clients))
        taken += clients
        skipped += bool(event.get("skipped"))
        reasons.update({str(kind): int(n) for kind, n in dict(event.get("refused_for") or {}).items()})
    return Losses(asked, max(asked - taken, 0), len(rounds), skipped, dict(reasons))


def notes(events: Sequence[Event]) -> Iterator[str]:
    """In words: each erased model that was refused, the first client that raised, each detector without a number."""
    for event in events:
        if event["event"] == "erase" and not event.get("accepted", True):
            when = f"round {event['round']}: " if event["round"] else ""
            yield f"{when}the model that {event['eraser']} left was refused{_because(event)}"
        elif event["event"] == "detection" and event.get("auroc") is None:
            yield f"no AUROC of {event.get('detector')} on the model {event.get('model')!r}{_because(event)}"
    raised = [event for event in events if event["event"] == "client_failed"]
    if raised:
        more = f" (and {len(raised) - 1} more)" if len(raised) > 1 else ""
        yield f"round {raised[0].get('round')}: client {raised[0].get('client')} raised{_because(raised[0])}{more}"


def _because(event: Event) -> str:
    return f": {event['reason']}" if event.get("reason") else ""
