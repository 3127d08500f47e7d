"""Cases: one defense against one attack under one seed, with its curve and the numbers that it comes to.

A federated run is one case. A centralized run is one for its victim and one for each eraser that was tried on it; so
are the baselines beside a federated run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fl_sim.report.defaults import completed
from fl_sim.report.reading import Event, Run, Unread
from fl_sim.report.refusals import Losses, losses, notes

FEDERATED, CENTRAL, BESIDE = "federated", "centralized", "baseline"
"""A run; `fl-sim central`; `baselines=[...]` beside a run."""
AUROC = "auroc"
"""What measures of input detectors begin with, their name after it."""
BEFORE = " (before erasing)"
"""What the name of such a measure ends with if it is about the model that the last erasing found."""
VICTIM, NONE = "victim", "none"
# What decides no number (or only its last bits), or only describes.
IGNORED = (
    *("seed", "seeds", "name", "output", "device", "choices", "tracker", "checkpoint", "erasers", "baselines"),
    *("detection", "detectors", "data.root", "data.download", "eval.per_class", "central.track"),
    *("engine._target_", "engine.workers", "engine.server_threads", "engine.deterministic", "engine.channels_last"),
)
IGNORED_CHOICES = ("engine", "tracker", "experiment", "detection")
CENTRAL_SECTIONS = ("data", "model", "client", "attack", "trigger", "backdoor", "central", "init", "engine")
"""What a centralized result depends on, beside its eraser."""
BESIDE_LACKS = ("aggregator", "server_optimizer", "sampler", "eraser", "erasing", "detection")
"""What a baseline beside a run does not depend on."""


@dataclass(frozen=True)
class Curve:
    """Scores by round (or epoch): those of the round's end, and of before an erasing where there was one."""

    at: Sequence[int] = ()
    acc: Sequence[float | None] = ()
    asr: Sequence[float | None] = ()


@dataclass(frozen=True)
class Erasing:
    """One erasing of a federated run, and the ASR in the rounds after it, up to the next one."""

    round: int
    accepted: bool
    acc_before: float | None
    asr_before: float | None
    back: int | None
    """Rounds until ASR was above half of what it had been; None: not before the next erasing, or the end."""
    after: Sequence[tuple[int, float]]
    """ASR by rounds since, 0 being right after; the last may be what the next erasing found."""


@dataclass(frozen=True)
class Case:
    """One defense against one attack under one seed."""

    run: int
    """Which run it is from."""
    kind: str
    keys: Mapping[str, str]
    """All that decides its numbers but the seeds, flat, as text; groups by their choice."""
    seeds: tuple[str, ...]
    finished: bool
    measures: Mapping[str, float]
    curve: Curve = field(default_factory=Curve)
    erasings: Sequence[Erasing] = ()
    losses: Losses | None = None
    """What became of the updates, where the run says it."""
    notes: Sequence[str] = ()
    """What was refused or failed, in words."""


def understood(run: Run, number: int) -> list[Case] | Unread:
    """The cases of one run, or why there are none: a foreign file may hold anything."""
    try:
        return list(cases_of(run, number))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return Unread(run.folder, f"its content can't be understood: {type(error).__name__}: {error}")


def cases_of(run: Run, number: int) -> Iterator[Case]:
    """The cases of one run; `number` is what it is called by."""
    seeds = _seeds(run.config)
    keys = flat(completed(run.config))
    if not run.central:
        own = {key: value for key, value in keys.items() if not key.startswith("central.")}
        yield _federated(run, number, own, seeds)
    pooled = [event for event in run.events if event["event"] == "erase" and not event["round"]]
    courses: dict[str, list[Event]] = {}
    for event in run.events:
        if event["event"] == "central":
            courses.setdefault(event["method"], []).append(event)
    if not (pooled or courses):
        return
    kind = CENTRAL if run.central else BESIDE
    shared = {key: value for key, value in keys.items() if _depends(kind, key)}
    victim = _victim(pooled, courses.get(VICTIM, []), run.finished) | _aurocs(run.events, VICTIM)
    curve, said = _course(courses.get(VICTIM, [])), [*notes(_of(run.events, VICTIM))]
    known = "asr" in victim or "acc" in victim
    yield Case(number, kind, shared | {"eraser": NONE}, seeds, known, victim, curve, notes=said)
    for event in pooled:
        name = event["eraser"]
        own = shared | _section("eraser", name, _eraser(run.config, name))
        measures = _known(event, "acc", "asr", "ra", "der") | _known({"erasing_seconds": event.get("seconds")})
        measures |= {"taken": float(event["accepted"])} if "accepted" in event else {}
        measures |= _aurocs(run.events, name)
        said = [*notes([event, *_of(run.events, name)])]
        yield Case(number, kind, own, seeds, True, measures, _course(courses.get(name, [])), notes=said)


def flat(config: Mapping[str, Any]) -> dict[str, str]:
    """The keys that decide a run's numbers, dotted, with their values as text; a group's own key holds its choice."""
    found: dict[str, str] = {}
    choices = config["choices"]
    for group, choice in choices.items():
        if group not in IGNORED_CHOICES:
            found[group] = NONE if choice is None else str(choice)
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _section(key, found.get(key), value)
        elif key not in IGNORED:
            found[str(key)] = text(value)
    if found.get("eraser", NONE) == NONE:  # without an eraser it does not matter when it would have run
        found = {key: value for key, value in found.items() if key.split(".")[0] != "erasing"}
    return found


def text(value: object) -> str:
    """A value of a configuration as one would type it."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _section(name: str, choice: str | None, content: Mapping[str, Any]) -> dict[str, str]:
    found = {} if choice is None else {name: choice}
    for key, value in content.items():
        dotted = f"{name}.{key}"
        if name in IGNORED or dotted in IGNORED or key in ("paper", "fidelity"):
            continue
        if isinstance(value, Mapping):
            found |= _section(dotted, None, value)
        else:
            found[dotted] = text(value)
    return found


def _seeds(config: Mapping[str, Any]) -> tuple[str, ...]:
    seeds = config.get("seeds")
    if not isinstance(seeds, Mapping):
        return (text(config.get("seed")),)
    parts = tuple(text(seeds.get(part, config.get("seed"))) for part in ("data", "threat", "train"))
    return parts[:1] if len(set(parts)) == 1 else parts


def _depends(kind: str, key: str) -> bool:
    section = key.split(".")[0]
    return section in CENTRAL_SECTIONS if kind == CENTRAL else section not in BESIDE_LACKS


def _eraser(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The section of an eraser that was tried centrally."""
    for key in ("erasers", "baselines"):
        section = config.get(key)
        if isinstance(section, Mapping) and isinstance(section.get(name), Mapping):
            found: Mapping[str, Any] = section[name]
            return found
    own = config.get("eraser")
    return own if isinstance(own, Mapping) else {}


def _known(event: Mapping[str, Any], *keys: str) -> dict[str, float]:
    return {key: event[key] for key in keys or event if event.get(key) is not None}


def _victim(pooled: Sequence[Event], course: Sequence[Event], finished: bool) -> dict[str, float]:
    """The victim's scores: what erasers found, which is exact, or else the last epoch's, once it is over."""
    if pooled:
        return _known({key: pooled[0].get(f"{key}_before") for key in ("acc", "asr", "ra")})
    return _known(course[-1], "acc", "asr", "ra") if course and finished else {}


def _aurocs(events: Sequence[Event], model: str, end: str = "") -> dict[str, float]:
    """How well each input detector tells stamped images apart on one of the run's models."""
    found = [event for event in _of(events, model) if event.get("auroc") is not None]
    return {f"{AUROC} {event.get('detector')}{end}": event["auroc"] for event in found}


def _of(events: Sequence[Event], model: str) -> list[Event]:
    """What detectors said of one of the run's models."""
    return [event for event in events if event["event"] == "detection" and event.get("model") == model]


def _course(events: Sequence[Event]) -> Curve:
    return _curve(events, "epoch")


def _curve(events: Sequence[Event], unit: str) -> Curve:
    acc, asr = ([event.get(key) for event in events] for key in ("acc", "asr"))
    return Curve([event[unit] for event in events], acc, asr)


def _federated(run: Run, number: int, keys: Mapping[str, str], seeds: tuple[str, ...]) -> Case:
    rounds = [event for event in run.events if event["event"] == "round"]
    scored = [event for event in rounds if event.get("acc") is not None]
    erase = [event for event in run.events if event["event"] == "erase" and event["round"]]
    curve = _curve(scored, "round")
    erasings, lost = _erasings(erase, curve), losses(rounds)
    own = [e for e in run.events if e["event"] != "detection" or e.get("model") in ("final", "before_erasing")]
    said = [*notes([event for event in own if event["event"] != "erase" or event["round"]])]
    measures: dict[str, float] = {}
    if scored and run.finished:
        last = scored[-1]
        late = [event for event in scored if event["round"] > last["round"] * 2 / 3]
        measures |= _known(last, "acc", "asr", "ra")
        for key in ("acc", "asr"):
            measures |= _mean(f"{key}_late", (event.get(key) for event in late))
        tops = [event["asr"] for event in scored if event.get("asr") is not None]
        tops += [each.asr_before for each in erasings if each.asr_before is not None]
        measures |= {"asr_max": max(tops)} if tops else {}
        measures |= _mean("tpr", (event.get("tpr") for event in rounds))
        measures |= _mean("fpr", (event.get("fpr") for event in rounds))
        measures |= _mean("der", (event.get("der") for event in erase if event.get("accepted")))
        measures |= _aurocs(run.events, "final") | _aurocs(run.events, "before_erasing", BEFORE)
        measures["seconds"] = sum(event.get("seconds") or 0 for event in rounds)
        if erase:
            measures["erasing_seconds"] = sum(event.get("seconds") or 0 for event in erase)
            measures["taken"] = sum(each.accepted for each in erasings) / len(erasings)
        if lost is not None and lost.asked:
            measures |= {"lost": lost.lost / lost.asked, "skipped": lost.skipped / lost.rounds}
        if any(keys.get(key, NONE) != NONE for key in ("attack", "collusion")):
            measures |= _mean("held", (held(each) for each in erasings))
    return Case(number, FEDERATED, keys, seeds, bool(measures), measures, curve, erasings, lost, said)


def _mean(name: str, values: Iterator[float | None]) -> dict[str, float]:
    known = [value for value in values if value is not None]
    return {name: sum(known) / len(known)} if known else {}


def held(erasing: Erasing) -> float | None:
    """Rounds for which an erasing held, as far as they could be watched; None if they could not, or nothing was there.

    An ASR that was not back when the next erasing came (or the run ended) has held for at least that long.
    """
    if not erasing.accepted or not erasing.asr_before or len(erasing.after) < 2:
        return None
    return float(erasing.back if erasing.back is not None else erasing.after[-1][0])


def _erasings(erase: Sequence[Event], curve: Curve) -> list[Erasing]:
    found = []
    taken = [event for event in erase if event.get("accepted", True)]
    for event in erase:
        start, before = event["round"], event.get("asr_before")
        later = next((each for each in taken if each["round"] > start), None)
        end = later["round"] if later else None
        points = [(0, event.get("asr"))]
        points += [
            (at - start, asr)
            for at, asr in zip(curve.at, curve.asr, strict=True)
            if at > start and (end is None or at < end)
        ]
        points += [(end - start, later.get("asr_before"))] if later and end is not None else []
        after = [(since, asr) for since, asr in points if asr is not None]
        back = next((since for since, asr in after if before and asr > before / 2), None)
        accepted = bool(event.get("accepted", True))
        found.append(Erasing(start, accepted, event.get("acc_before"), before, back, after))
    return found
