"""An attacker that knows that the server erases, how, and when; this project's own.

`align` does the server's work beforehand. As in attention distillation (Li et al., ICLR 2021) it fine-tunes a teacher
from the received model on its own clean samples, and adds to its poisoned training

    strength · Σ_l β_l · d(Â_S^l(stamped x), Â_T^l(x)),

with the eraser's own β, d and power where it has them. So the model looks at a *stamped* image where the teacher looks
at the *clean* one, and the server's alignment finds nothing to correct. The clean view is the default because the
teacher comes from a model that may hold the backdoor: on a stamped image it may still look at the trigger, and copying
that hides nothing. On the clean image no trace of it is left; what then decides lies in the mix of channels, which the
map's sum over channels can't see. `view: stamped` takes the teacher's map of the same stamped image.

The extra pass is one in training mode, as the student's is in a distillation, so batch statistics see stamped images.

`align` boosts its update in every round, as model replacement does. `strike` attacks, boosted, only in rounds right
after an erasing, so that the backdoor has the longest time to live, and is honest in all others. `both` strikes with
alignment, and between erasings poisons with alignment but without boost.

Without an eraser, or if no round follows an erasing, there is nothing to adapt to: plain model replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clients.attacks.data_poisoning import own_pace
from clients.attacks.hooked import hooked
from clients.attacks.model_replacement import ModelReplacement, boosted, replacing_factor
from fl_sim.attention import attention_loss
from fl_sim.backdoor import Backdoor
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, ServerPlan, Update
from fl_sim.samples import Samples
from fl_sim.training import Objective

View = Literal["clean", "stamped"]


def endless(samples: Samples, size: int, ctx: ClientContext) -> Iterator[Tensor]:
    """Batches of pixels, epoch after epoch."""
    while True:
        yield from (x for x, _ in samples.batches(size, ctx.rng))


def aligned(
    teacher: Classifier, backdoor: Backdoor, clean: Iterator[Tensor], view: View, strength: float, how: dict[str, Any]
) -> Callable[[Objective], Objective]:
    """From L to L + strength · the attention loss between stamped images and the teacher's view of the same images."""

    def around(inner: Objective) -> Objective:
        def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            assert isinstance(model, Classifier)
            pixels = next(clean)
            stamped = backdoor.stamp(pixels)
            _, taps = model.with_taps(stamped)
            with torch.no_grad():
                _, targets = teacher.with_taps(pixels if view == "clean" else stamped)
            return inner(model, x, y) + strength * attention_loss(taps, targets, **how)

        return objective

    return around


def strikes(plan: ServerPlan, round_: int) -> bool | None:
    """Whether this round follows an erasing; None if none ever does."""
    if not any(plan.erased_before(later) for later in range(2, plan.rounds + 1)):
        return None
    return plan.erased_before(round_)


@dataclass(frozen=True)
class Adaptive(ModelReplacement):
    """Poisons so that the server's erasing finds nothing to correct, or attacks right after an erasing, or both.

    The teacher takes `teacher_epochs` on the attacker's own clean samples.
    """

    boost: float | Literal["auto"] = 5.0
    adapt: Literal["align", "strike", "both"] = "align"
    view: View = "clean"
    strength: float = 1.0
    teacher_epochs: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.strength >= 0, "strength", self.strength, "must be 0 or more")
        require(self.teacher_epochs >= 1, "teacher_epochs", self.teacher_epochs, "must be 1 or more")

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        assert ctx.threatening is not None
        known, plan = ctx.threatening, ctx.threatening.plan
        now = None if plan is None else strikes(plan, ctx.round)
        if self.adapt == "strike" and now is False:
            return self.client.update(model, samples, ctx)
        poisoned, backdoor, record = self.poisoned(model, samples, ctx)
        if plan is not None and plan.eraser is not None and self.adapt != "strike":
            teacher = self.teacher(model, samples, ctx)
            how = {
                key: getattr(plan.eraser, key) for key in ("weights", "distance", "power") if hasattr(plan.eraser, key)
            }
            how = {"weights": (0.5, 4.0, 16.0), **how}
            size = getattr(self.trainer, "batch_size", 32)
            clean = endless(Samples(samples.images, samples.labels), size, ctx)
            ctx = hooked(ctx, around=aligned(teacher, backdoor, clean, self.view, self.strength, how))
        update = replace(self.trainer.update(model, poisoned, ctx), record=record)
        if self.adapt == "both" and now is False:
            return update
        factor = replacing_factor(known) if self.boost == "auto" else self.boost
        return replace(update, delta=boosted(update.delta, factor, ctx.layout))

    def teacher(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Classifier:
        """The model after a rehearsal of the server's fine-tuning; the model itself is left alone."""
        copy = deepcopy(model)
        own_pace(self.trainer, self.teacher_epochs, None).update(copy, samples, ctx)
        return copy.eval().requires_grad_(False)
