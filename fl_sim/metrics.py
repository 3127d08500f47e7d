"""Scores of a model: how right it is, and how much it obeys a trigger."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_sim.backdoor import Backdoor
from fl_sim.samples import Samples
from fl_sim.walk import set_to_train

CHUNK = 512


@dataclass(frozen=True)
class Score:
    """ACC, ASR with its 95 % interval, ACC without the target class, RA, all as fractions, and the clean loss.

    What has no image to be measured on (a test set of the target class alone) is None.
    """

    acc: float
    asr: float | None
    asr_low: float | None
    asr_high: float | None
    acc_non_target: float | None
    ra: float | None
    loss: float
    asr_unstamped: float | None = None
    """The share of the victims taken for the wanted class *without* the trigger: high if the model has collapsed."""
    acc_per_class: tuple[float | None, ...] | None = None
    """ACC within each class, where it was asked for."""

    def fields(self) -> dict[str, Any]:
        fields = asdict(self)
        if self.acc_per_class is None:
            del fields["acc_per_class"]
        return fields


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson interval of a binomial share (Wilson 1927); by default at 95 %."""
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    # At 0 and at all the bounds are exactly 0 and 1, which rounding would miss by 1e-17.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == trials else middle + half)


@torch.no_grad()
def evaluate(
    model: nn.Module, test: Samples, backdoor: Backdoor, *, per_class: bool = False, chunk: int = CHUNK
) -> Score:
    """Score a model on a test set: each image goes through once clean and, if it is a victim, once stamped."""
    was_training = model.training
    set_to_train(model, False)
    # Summed on the device, a row at a time, and read once.
    counts = torch.zeros(4, dtype=torch.long, device=test.labels.device)
    counts_of_victims = torch.zeros(3, dtype=torch.long, device=test.labels.device)
    # Float64 where the device has it: Apple's GPUs do not.
    wide = torch.float32 if test.labels.device.type == "mps" else torch.float64
    loss = torch.zeros((), dtype=wide, device=test.labels.device)
    right_of = torch.zeros(backdoor.classes, dtype=torch.long, device=test.labels.device)
    for x, y in test.chunks(chunk):
        victims = backdoor.victims(x, y)
        every = backdoor.goal.rule == "all_to_all"
        others = torch.ones_like(y, dtype=torch.bool) if every else y != backdoor.goal.target
        logits = model(x)
        answers = logits.argmax(1)
        right = answers == y
        if per_class:
            right_of += torch.bincount(y[right], minlength=backdoor.classes)
        loss += F.cross_entropy(logits, y, reduction="sum")
        counts += torch.stack([right, right & others, others, victims]).sum(1)
        attacked = victims.nonzero()[:, 0]
        stamped = backdoor.stamp(x[attacked])
        answered = model(stamped) if len(stamped) else logits[:0]
        # Among NaN logits argmax finds class 0; an answer that is none obeys nobody and is right for nobody.
        predicted = answered.argmax(1).masked_fill_(~answered.isfinite().all(1), -1)
        truth = y[attacked]
        wanted = backdoor.goal.labels(truth, backdoor.classes)
        unstamped = answers[attacked] == wanted
        counts_of_victims += torch.stack([predicted == wanted, predicted == truth, unstamped]).sum(1)
    set_to_train(model, was_training)
    correct, correct_others, other, trials = counts.tolist()
    obeyed, robust, obedient_unstamped = counts_of_victims.tolist()
    low, high = wilson(obeyed, trials) if trials else (None, None)

    def share(count: int) -> float | None:
        return count / trials if trials else None

    return Score(
        acc=correct / len(test),
        asr=share(obeyed),
        asr_low=low,
        asr_high=high,
        acc_non_target=correct_others / other if other else None,
        ra=share(robust),
        loss=float(loss) / len(test),
        asr_unstamped=share(obedient_unstamped),
        acc_per_class=_shares(right_of, torch.bincount(test.labels, minlength=len(right_of))) if per_class else None,
    )


def judged(score: Score, finite: bool) -> Score:
    """A score as it may be told.

    Among NaN logits argmax finds class 0: what looks like obedience to a trigger, or like a cure, is a destroyed model.
    """
    if finite:
        return score
    return replace(score, asr=None, asr_low=None, asr_high=None, ra=None, asr_unstamped=None)


def _shares(right: Tensor, all_: Tensor) -> tuple[float | None, ...]:
    return tuple(hits / count if count else None for hits, count in zip(right.tolist(), all_.tolist(), strict=True))


@torch.no_grad()
def accuracy(model: nn.Module, samples: Samples, *, chunk: int = CHUNK) -> float:
    """The share of samples that a model gets right; what a defender may measure on its clean set."""
    was_training = model.training
    set_to_train(model, False)
    right = torch.zeros((), dtype=torch.long, device=samples.labels.device)
    for x, y in samples.chunks(chunk):
        right += (model(x).argmax(1) == y).sum()
    set_to_train(model, was_training)
    return int(right) / len(samples)


def defense_effectiveness(acc_before: float, asr_before: float, acc: float, asr: float) -> float:
    """DER = (max(0, ΔASR) − max(0, ΔACC) + 1) / 2, the deltas before minus after."""
    return (max(0.0, asr_before - asr) - max(0.0, acc_before - acc) + 1) / 2


def is_finite(vector: Tensor) -> bool:
    """Whether a vector holds no NaN and no infinity."""
    return bool(torch.isfinite(vector).all())


def refusal(model: nn.Module, erased: nn.Module, clean: Samples | None, floor: float) -> str | None:
    """Why an erased model can't take the model's place, by what a server can see; None if it can."""
    if not all(is_finite(tensor) for tensor in erased.state_dict().values()):
        return "the erased model holds NaN or infinity"
    if clean is None:
        return None
    had, has = accuracy(model, clean), accuracy(erased, clean)
    if has < floor * had:
        return f"clean-set accuracy fell from {had:.3f} to {has:.3f}, below {floor:g} of it"
    return None
