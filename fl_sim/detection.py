"""How well detectors tell stamped inputs from clean ones: the side that knows which is which."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fl_sim.backdoor import Backdoor
from fl_sim.metrics import CHUNK, is_finite
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import Detector, Screen, Selecting, ServerContext, State, Tracker
from fl_sim.randomness import generator
from fl_sim.samples import Samples

EVENT = "detection"
NUMBERS = ("auroc", "auroc_low", "auroc_high", "tpr_at_fpr_5")
FPR = 0.05


def auroc(clean: Tensor, stamped: Tensor) -> float:
    """The share of pairs in which the stamped image has the higher score, ties counting half (Mann & Whitney 1947)."""
    ordered = clean.sort().values
    below = torch.searchsorted(ordered, stamped) + torch.searchsorted(ordered, stamped, right=True)
    return int(below.sum()) / (2 * len(clean) * len(stamped))


def auroc_interval(share: float, clean: int, stamped: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of an AUROC (Newcombe 2006, method 5), which like Wilson's has no zero width at 1.

    All θ with |AUROC − θ| ≤ z·√V(θ), where with h = (n + m)/2 − 1
    V(θ) = θ(1 − θ)(1 + h·(1 − θ)/(2 − θ) + h·θ/(1 + θ)) / (n·m).
    """
    half = (clean + stamped) / 2 - 1

    def outside(theta: float) -> bool:
        spread = 1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta)
        return abs(share - theta) > z * math.sqrt(theta * (1 - theta) * spread / (clean * stamped))

    return _edge(outside, 0.0, share), _edge(outside, 1.0, share)


def _edge(outside: Callable[[float], bool], end: float, inside: float) -> float:
    """Between an end of the scale and a point inside: where the interval ends, by halving."""
    if end == inside:
        return end
    for _ in range(50):
        middle = (end + inside) / 2
        end, inside = (middle, inside) if outside(middle) else (end, middle)
    return inside


def tpr_at(clean: Tensor, stamped: Tensor, fpr: float) -> float:
    """The share of stamped images above the lowest threshold that no more than `fpr` of the clean ones are above."""
    threshold = clean.sort(descending=True).values[math.floor(fpr * len(clean))]
    return float((stamped > threshold).double().mean())


def scored(screen: Screen, test: Samples, backdoor: Backdoor) -> tuple[Tensor, Tensor]:
    """Scores of clean and of stamped test images: those that ASR counts, without and with the trigger.

    Of a natural trigger, which some images carry and none gets, the clean ones are those that lack it.
    """
    clean: list[Tensor] = []
    stamped: list[Tensor] = []
    for x, y in test.chunks(CHUNK):
        victims = backdoor.victims(x, y)
        natural = isinstance(backdoor.trigger, Selecting)
        for scores, images in (
            (clean, x[backdoor.goal.victims(y) & ~victims] if natural else x[victims]),
            (stamped, backdoor.stamp(x[victims])),
        ):
            if len(images):
                scores.append(screen.score(images).cpu().double())
    nothing = [torch.zeros(0)]
    return torch.cat(clean or nothing), torch.cat(stamped or nothing)


def unmeasured(reason: str, clean: int = 0, stamped: int = 0) -> dict[str, Any]:
    """What an event says where there is no AUROC."""
    return dict.fromkeys(NUMBERS) | {"clean": clean, "stamped": stamped, "reason": reason}


def measured(clean: Tensor, stamped: Tensor) -> dict[str, Any]:
    """What an event says of two sets of scores; `reason` where AUROC can't be given."""
    counts = {"clean": len(clean), "stamped": len(stamped)}
    if not len(clean) or not len(stamped):
        return unmeasured("there are no images to tell apart", **counts)
    if not is_finite(torch.cat([clean, stamped])):
        return unmeasured("a score is NaN or infinite", **counts)
    share = auroc(clean, stamped)
    numbers = (share, *auroc_interval(share, len(clean), len(stamped)), tpr_at(clean, stamped, FPR))
    return dict(zip(NUMBERS, numbers, strict=True)) | counts


class Screening:
    """Tries detectors on one model after another; what they remember lasts from model to model.

    What is in `found` already, results of an interrupted attempt by model and detector, is not measured again.
    """

    def __init__(
        self,
        detectors: Mapping[str, Detector],
        test: Samples,
        seed: int,
        tracker: Tracker,
        found: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self._detectors, self._test, self._seed, self._tracker = detectors, test, seed, tracker
        self._states: dict[str, State] = {name: {} for name in detectors}
        self._found = {
            (event["model"], event["detector"]): {key: value for key, value in event.items() if key != "event"}
            for event in found
        }

    @property
    def results(self) -> list[dict[str, Any]]:
        """What the events say, those of the interrupted attempt first."""
        return list(self._found.values())

    def inspect(self, name: str, model: Classifier, backdoor: Backdoor, ctx: ServerContext) -> None:
        """Log a `detection` event for each detector, about the model of this name."""
        for detector in self._detectors:
            if (name, detector) not in self._found:
                fields = self._one(name, detector, model, backdoor, ctx)
                self._tracker.log(EVENT, **fields)
                self._found[name, detector] = fields

    def _one(
        self, name: str, detector: str, model: Classifier, backdoor: Backdoor, ctx: ServerContext
    ) -> dict[str, Any]:
        """Try one detector on one model."""
        started = time.perf_counter()
        # The same draws for each model: what a detector trains for itself does not depend on which model came first.
        ctx = replace(ctx, rng=generator(self._seed, "detect", detector), vector=ctx.layout.read(model))
        if is_finite(ctx.vector):
            result = self._tried(detector, model, backdoor, ctx)
        else:
            result = unmeasured("the model holds NaN or infinity")
        fields = {"round": ctx.round, "model": name, "detector": detector} | result
        return fields | {"seconds": time.perf_counter() - started}

    def _tried(self, detector: str, model: Classifier, backdoor: Backdoor, ctx: ServerContext) -> dict[str, Any]:
        was_training = model.training
        model.eval()
        screen = self._detectors[detector].screen(model, self._states[detector], ctx)
        self._states[detector] = screen.state
        scores = scored(screen, self._test, backdoor)
        model.train(was_training)
        return measured(*scores) | dict(screen.facts)
