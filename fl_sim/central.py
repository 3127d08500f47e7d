"""Centralized baselines: one model trained on the pooled, poisoned data, and what erasers make of it.

The same erasers, training loop and scores as in a federated run; only the federation is gone.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fl_sim.attention_picture import Album
from fl_sim.backdoor import Backdoor
from fl_sim.checkpoint import load_tensors, save_tensors
from fl_sim.detection import EVENT as DETECTION
from fl_sim.detection import Screening
from fl_sim.errors import FolderError, RunError
from fl_sim.finished import fault_in_detection, fault_in_result
from fl_sim.folder import waiting, write_text
from fl_sim.metrics import Score, defense_effectiveness, evaluate, is_finite, judged, refusal
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, Detector, Eraser, Fit, Learned, ServerContext, State, Tracker, Workshop
from fl_sim.randomness import generator
from fl_sim.samples import Samples
from fl_sim.schema import Central, Settings, locate
from fl_sim.trackers.following import rebuild
from fl_sim.tracking import METRICS, JsonLines, read_metrics
from fl_sim.training import fit
from fl_sim.world import World, digest, fingerprint

VICTIM = "victim"


@dataclass(frozen=True)
class Victim:
    """A backdoored model, what its trigger had to learn, and how long all that took."""

    model: Classifier
    record: State
    seconds: float


class Course:
    """The shared training loop with scores on the way: a `central` event for each of a method's epochs that is due.

    With `only`, epochs of other models (a client's private teacher) are not the method's.
    """

    def __init__(
        self, tracker: Tracker, method: str, world: World, backdoor: Backdoor, *, only: Classifier | None = None
    ) -> None:
        self._tracker, self._method, self._only = tracker, method, only
        self._track = world.parts.settings.central.track
        self._images, self._backdoor, self._layout = watched(world, self._track.images), backdoor, world.layout
        self._epoch = self._scored = 0
        self.scoring = 0.0
        """The seconds that scoring took, which are no part of a method's cost."""

    @property
    def fit(self) -> Fit:
        """Models on the way (teachers, students) are scored as they are trained; generators and masks are not."""
        fitting: Fit = partial(fit, after_epoch=(self._note,))
        return fitting

    def end(self, model: Classifier) -> None:
        """Score the last epoch, if it was not due."""
        if self._scored < self._epoch:
            self._score(model)

    def _note(self, model: nn.Module) -> None:
        if isinstance(model, Classifier) and (self._only is None or model is self._only):
            self._epoch += 1
            if self._track.every is not None and self._epoch % self._track.every == 0:
                self._score(model)

    def _score(self, model: Classifier) -> None:
        started = time.perf_counter()
        score = judged(evaluate(model, self._images, self._backdoor), is_finite(self._layout.read(model)))
        self.scoring += time.perf_counter() - started
        self._scored = self._epoch
        fields = {**shown(score), "loss": score.loss}
        if self._track.images is not None:
            fields["images"] = len(self._images)
        self._tracker.log("central", round=0, method=self._method, epoch=self._epoch, **fields)


def watched(world: World, images: int | None) -> Samples:
    """The test images that scores on the way use: all of them, or as many as `images`, the same for every method."""
    if images is None or images >= len(world.test):
        return world.test
    order = torch.randperm(len(world.test), generator=generator(world.parts.settings.seeds.data, "central", "track"))
    return world.test[order[:images].sort().values]


def pooled(world: World) -> Samples:
    """All clients' samples as one set."""
    return world.train[torch.from_numpy(np.sort(np.concatenate(world.shares)))]


def train_clean(world: World, plan: Central) -> tuple[Classifier, float]:
    """A model trained as the victim is, on nothing poisoned; and the seconds that took."""
    started, model = time.perf_counter(), world.initial_model()
    _train(model, pooled(world), world, plan, fit, generator(world.parts.settings.seeds.train, "central", "clean"))
    return model, time.perf_counter() - started


def train_victim(
    world: World, plan: Central, tracker: Tracker, clean: Callable[[], tuple[Classifier, float]] | None = None
) -> Victim:
    """Train the run's model on the pooled data, of which a share is poisoned.

    What takes a model to make is made with a clean one, trained alike: `clean` brings it.
    """
    started, learning = time.perf_counter(), 0.0
    samples, model = pooled(world), world.initial_model()
    rng = generator(world.parts.settings.seeds.train, "central", "victim")
    backdoor, record, workshop = world.backdoor, dict[str, Any](), None
    if backdoor.needs_workshop:
        if backdoor.uses_model:
            teacher, learning = train_clean(world, plan) if clean is None else clean()
            started = time.perf_counter()
        else:
            teacher = world.initial_model()
        workshop = Workshop(teacher.eval().requires_grad_(False), backdoor.goal, backdoor.classes, rng, 0, 1)
        if isinstance(backdoor.trigger, Learned):
            record = dict(backdoor.trigger.learn(samples, workshop))
            backdoor, workshop = backdoor.recalling(record), replace(workshop, record=record)
    poisoned = backdoor.poison(samples, plan.poison_rate, plan.mode, rng, workshop)
    course = Course(tracker, VICTIM, world, backdoor, only=model)
    _train(model, poisoned, world, plan, course.fit, rng)
    course.end(model)
    return Victim(model.eval(), record, learning + time.perf_counter() - started - course.scoring)


def _train(model: Classifier, samples: Samples, world: World, plan: Central, fit_: Fit, rng: torch.Generator) -> None:
    """Centralized training is the benign client of the run on all the data, with the plan's numbers for its own."""
    client: Any = world.parts.client
    own = {field.name for field in dataclasses.fields(client)}
    changes = {key: value for key, value in dataclasses.asdict(plan).items() if key in own}
    data, layout = world.parts.data, world.layout
    ctx = ClientContext(0, 0, rng, data.facts.classes, layout, layout.read(model), data.augment, fit_)
    replace(client, **changes).update(model, samples, ctx)


def planned(config: Mapping[str, Any], world: World) -> tuple[Central, Mapping[str, Any]]:
    """How a run's victim is trained, and the configuration that names it: with the one poison rate that counts."""
    asked = world.parts.settings.central
    plan = asked.against(world.backdoor.goal.rule)
    if plan == asked:
        return plan, config
    rates = {"poison_rate": plan.poison_rate, "clean_label_rate": None}
    return plan, {**config, "central": {**config["central"], **rates}}


def cached_victim(world: World, plan: Central, tracker: Tracker, config: Mapping[str, Any], folder: Path) -> Victim:
    """The victim of this configuration, trained once and kept in `folder`; whoever else wants it meanwhile waits."""
    path = folder / f"{victim_hash(config)}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    with waiting(path.with_suffix(".lock")):
        return _found(path, world, tracker) or _kept_victim(path, world, plan, tracker, config)


def _found(path: Path, world: World, tracker: Tracker) -> Victim | None:
    """The victim in a file, or None if there is none or the file is damaged."""
    try:
        saved = load_tensors(path)
        model = world.new_model()
        model.load_state_dict(saved["model"])
        events = json.loads(saved["events"])
        record = {k: v.to(world.device) if isinstance(v, torch.Tensor) else v for k, v in saved["record"].items()}
        victim = Victim(model.eval(), record, saved["seconds"])
    except (RunError, KeyError, RuntimeError, TypeError, AttributeError, ValueError):
        return None
    for event in events:
        tracker.log("central", **event)
    return victim


def _kept_victim(path: Path, world: World, plan: Central, tracker: Tracker, config: Mapping[str, Any]) -> Victim:
    noted = Noting(tracker)
    victim = train_victim(world, plan, noted, partial(cached_clean, world, plan, config, path.parent))
    events = json.dumps(noted.events)
    state = victim.model.state_dict()
    save_tensors(path, {"model": state, "record": dict(victim.record), "events": events, "seconds": victim.seconds})
    return victim


def cached_clean(world: World, plan: Central, config: Mapping[str, Any], folder: Path) -> tuple[Classifier, float]:
    """The clean model beside the victims of a folder, trained once for all triggers that are made with one."""
    path = folder / f"clean-{digest(_unpoisoned(config))}.pt"
    with waiting(path.with_suffix(".lock")):
        try:
            saved = load_tensors(path)
            model = world.new_model()
            model.load_state_dict(saved["model"])
            return model, saved["seconds"]
        except (RunError, KeyError, RuntimeError, TypeError, AttributeError):
            model, seconds = train_clean(world, plan)
            save_tensors(path, {"model": model.state_dict(), "seconds": seconds})
            return model, seconds


class Noting:
    """A tracker that also keeps what it passes on."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self.events: list[dict[str, Any]] = []

    def log(self, event: str, **fields: Any) -> None:
        self.events.append(fields)
        self._tracker.log(event, **fields)


def victim_hash(config: Mapping[str, Any]) -> str:
    """Names a victim by what decides its weights, and by nothing else: ten erasers share one.

    How closely it was watched decides nothing, so a victim that is found again brings the scores of whoever trained it.
    """
    decisive = _unpoisoned(config) | {key: config[key] for key in ("trigger", "backdoor")}
    plan = {key: value for key, value in config["central"].items() if key != "track"}
    if plan.get("clean_label_rate") is None:
        plan.pop("clean_label_rate", None)
    decisive["central"] = plan
    # An attack that brings a trigger of its own decides the victim, too.
    target = config["attack"].get("_target_")
    if target is not None and hasattr(locate(target), "adopt"):
        decisive["attack"] = config["attack"]
    return digest(decisive)


def _unpoisoned(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the weights of a model that is trained as the victim, but on clean data."""
    decisive = {key: config[key] for key in ("data", "model", "client", "seeds", "init")}
    if config["init"]:
        decisive["init"] = fingerprint(str(config["init"]))
    poisoning = ("track", "poison_rate", "clean_label_rate", "mode")
    decisive["central"] = {key: value for key, value in config["central"].items() if key not in poisoning}
    decisive["engine"] = {key: config["engine"].get(key) for key in ("precision", "channels_last")}
    return decisive


def server_context(world: World, model: Classifier, method: str, fit_: Fit) -> ServerContext:
    """What a server knows that holds this model and has no clients."""
    return ServerContext(
        round=0,
        rng=generator(world.parts.settings.seeds.train, "central", "erase", method),
        device=world.device,
        classes=world.parts.data.facts.classes,
        clients=(),
        assumed_attackers=0,
        layout=world.layout,
        vector=world.layout.read(model),
        clean=world.clean,
        augment=world.parts.data.augment,
        new_model=world.new_model,
        fit=fit_,
    )


def try_eraser(
    world: World, victim: Victim, before: Score, name: str, eraser: Eraser, screening: Screening, tracker: Tracker
) -> tuple[dict[str, Any], Classifier]:
    """Erase a copy of the victim and try the detectors on it; logs and returns an `erase` event, and the model."""
    backdoor = world.backdoor.recalling(victim.record)
    course = Course(tracker, name, world, backdoor)
    ctx = server_context(world, victim.model, name, course.fit)
    started = time.perf_counter()
    erased = victim.model
    if is_finite(ctx.vector):  # as in a run: nothing can be learned from, or by, a model of NaN
        erased, _ = eraser.erase(victim.model, world.clean, {}, ctx)
    seconds = time.perf_counter() - started - course.scoring
    result = outcome(before, victim.model, erased, world, backdoor)
    fields = {"round": 0, "eraser": name} | result | {"seconds": seconds}
    # First, so that where the eraser's result is in the record all of its detections are.
    screening.inspect(name, erased, backdoor, replace(ctx, fit=fit))
    tracker.log("erase", **fields)
    return fields, erased


def _score(world: World, victim: Victim) -> Score:
    score = evaluate(victim.model, world.test, world.backdoor.recalling(victim.record))
    return judged(score, is_finite(world.layout.read(victim.model)))


def outcome(before: Score, model: Classifier, erased: Classifier, world: World, backdoor: Backdoor) -> dict[str, Any]:
    """Before and after, and whether a server would have taken the result, by the erasing policy's floor."""
    fields: dict[str, Any] = {"acc_before": before.acc, "asr_before": before.asr, "ra_before": before.ra}
    refused = refusal(model, erased, world.clean, world.parts.erasing.floor)
    verdict: dict[str, Any] = {"accepted": True} if refused is None else {"accepted": False, "reason": refused}
    if not is_finite(world.layout.read(erased)):
        return fields | {**shown(None), "der": None} | verdict
    after = evaluate(erased, world.test, backdoor)
    der = None
    if before.asr is not None and after.asr is not None:
        der = defense_effectiveness(before.acc, before.asr, after.acc, after.asr)
    return fields | {**shown(after), "der": der} | verdict


def shown(score: Score | None) -> dict[str, float | None]:
    """What is told of a model, or that it could not be scored; some papers' ACC leaves the target class out."""
    return {key: getattr(score, key, None) for key in ("acc", "acc_non_target", "asr", "ra")}


def run_central(config: Mapping[str, Any], world: World, folder: Path, *trackers: Tracker) -> dict[str, Any]:
    """Train or find the victim, try every eraser that has no result yet, and write the table."""
    finished, detections = _kept(folder)
    metrics = JsonLines(folder)
    rebuild(trackers, folder)
    both = Both(metrics, *trackers)
    settings = world.parts.settings
    screening = Screening(_detectors(world), world.test, settings.seeds.train, both, detections)
    try:
        told = Quiet(both) if finished or detections else both
        plan, decided = planned(config, world)
        victim = cached_victim(world, plan, told, decided, victims_of(settings))
        backdoor = world.backdoor.recalling(victim.record)
        before = _score(world, victim)
        screening.inspect(VICTIM, victim.model, backdoor, server_context(world, victim.model, VICTIM, fit))
        album = Album(folder, world.test, backdoor, settings.seeds.data)
        if not finished:
            album.start(VICTIM, victim.model)
        results = []
        for name, eraser in _asked(world).items():
            if name in finished:
                results.append(finished[name])
                continue
            fields, erased = try_eraser(world, victim, before, name, eraser, screening, both)
            results.append(fields)
            metrics.commit()
            album.add(name, erased)
    finally:
        metrics.close()
    save_tensors(folder / "model_before_erasing.pt", victim.model.state_dict())
    plain = [{key: value for key, value in result.items() if key != "event"} for result in results]
    scores = {**shown(before), "seconds": victim.seconds, "erasers": plain}
    return scores | ({"detections": screening.results} if screening.results else {})


def accompany(config: Mapping[str, Any], world: World, folder: Path, *trackers: Tracker) -> None:
    """Beside a federated run: its erasers of `baselines=[...]` on the pooled data, with its budget and poison share.

    As many passes over the data as the clients make in all, with the client's own learning rate and batches, and as
    many poisoned samples as the attackers would have.
    """
    plan = equal_budget(world)
    metrics = JsonLines(folder)
    both = Both(metrics, *trackers)
    try:
        budget = {**config, "central": dataclasses.asdict(plan)}
        victim = cached_victim(world, plan, both, budget, victims_of(world.parts.settings))
        nothing = Screening({}, world.test, world.parts.settings.seeds.train, both)
        before = _score(world, victim)
        for name, eraser in world.parts.baselines.items():
            try_eraser(world, victim, before, name, eraser, nothing, both)
        metrics.commit()
    finally:
        metrics.close()


def equal_budget(world: World) -> Central:
    """The plan of a centralized victim that sees as many samples as all clients of the run together."""
    settings, client, attack = world.parts.settings, world.parts.client, world.parts.attack
    passes = settings.rounds * settings.clients_per_round / settings.clients * getattr(client, "epochs", 1)
    shared = [field.name for field in dataclasses.fields(Central) if hasattr(client, field.name)]
    plan = replace(settings.central, **{name: getattr(client, name) for name in shared})
    held = sum(len(world.shares[c]) for c in world.malicious) / max(sum(map(len, world.shares)), 1)
    # Who stamps nothing leaves the centralized victim clean.
    stamps = getattr(attack, "stamps", True)
    rate = getattr(attack, "poison_rate", 0.0) if stamps else 0.0
    mode = getattr(attack, "mode", plan.mode)
    budget = max(1, round(passes))
    return replace(plan, epochs=budget, poison_rate=held * rate, clean_label_rate=None, mode=mode)


def _asked(world: World) -> Mapping[str, Eraser]:
    """The erasers of `erasers=[...]`, or the one of `eraser=`."""
    parts = world.parts
    if parts.settings.erasers:
        return parts.erasers
    return {} if parts.eraser is None else {str(parts.settings.choices["eraser"]): parts.eraser}


def _detectors(world: World) -> Mapping[str, Detector]:
    """The detectors of `detectors=[...]`, or the one of `detection=`."""
    parts = world.parts
    if parts.settings.detectors:
        return parts.detectors
    return {} if parts.detection is None else {str(parts.settings.choices["detection"]): parts.detection}


def _kept(folder: Path) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Results of an interrupted attempt: those of erasers by name, and those of detectors.

    Events of what was not finished are taken out of the file.
    """
    if not (folder / METRICS).exists():
        return {}, []
    events = list(read_metrics(folder))
    for number, event in enumerate(events, start=1):
        wrong = _fault_in(event)
        if wrong is not None:
            raise FolderError(f"can't read {folder / METRICS}: line {number} is damaged, {wrong}")
    finished = {event["eraser"]: event for event in events if event["event"] == "erase"}
    detections = [e for e in events if e["event"] == DETECTION and e["model"] in {*finished, VICTIM}]
    known = {*finished, *([VICTIM] if finished or detections else [])}
    kept = [e for e in events if e.get("eraser", e.get("method", e.get("model"))) in known]
    write_text(folder / METRICS, "".join(json.dumps(event) + "\n" for event in kept))
    return finished, detections


def _fault_in(event: Mapping[str, Any]) -> str | None:
    """What is wrong with an event of an interrupted attempt; None if nothing is."""
    kind = event["event"]
    if kind == "erase":
        return fault_in_result(event)
    if kind == DETECTION:
        return fault_in_detection(event)
    if kind != "central":
        return f"it is an event {str(kind)[:40]!r}, which fl-sim central does not write"
    return None if isinstance(event.get("method"), str) else "it lacks its method"


def victims_of(settings: Settings) -> Path:
    """Where the victims of all runs with the same output folder are kept."""
    return Path(settings.output) / "victims"


class Both:
    """Logs to the file and to whoever watches."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, event: str, **fields: Any) -> None:
        for tracker in self._trackers:
            tracker.log(event, **fields)


class Quiet(Both):
    """Says nothing: what it would log is in the file already."""

    def log(self, event: str, **fields: Any) -> None:
        pass
