"""RobustKD: distillation from a detoxified teacher (Chen et al., 2024, arXiv 2406.03409).

1. Detoxify: backdoored models show larger feature variance, so a mask M on the teacher's taps is trained on clean data
   to keep the task while shrinking it: min_M CE(T(x; M), y) + λ · mean_l Var(M_l ⊙ F_l)/Var(F_l), M in [0, 1].
2. Distil: L = CE(S(x'), y) + μ · Σ_l d(F_S^l(x'), M ⊙ F_T^l(x)), d the margin-ReLU distance of Heo et al. (ICCV 2019):
   the target's negative parts are raised to a margin, and a student below a negative target is not penalised;
   x' has 10 % of its pixels replaced by salt and pepper.

A reconstruction: of the paper the mask, the two losses and the noise are known, not their forms. Ours are: masks per
channel that start at 1; distances relative to the target's mean square; λ, μ, rates. The paper's student is a fresh,
smaller network that sees the whole training set; here it must have the model's layout and a clean set of a few hundred,
so it starts from the model (`student: fresh` starts from new weights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from fl_sim.distillation import frozen_copy
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier, initialise
from fl_sim.protocols import ServerContext, State
from fl_sim.samples import Samples
from fl_sim.training import Objective
from fl_sim.tuning import Tuning


@contextmanager
def masked(model: Classifier, masks: Sequence[Tensor]) -> Iterator[None]:
    """The model with each tap's channels multiplied by a mask [C], seen by all that comes after."""

    def multiply(mask: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
        return lambda _module, _inputs, output: output * mask.view(1, -1, 1, 1)

    taps = [model.body.get_submodule(name) for name in model.taps]
    hooks = [tap.register_forward_hook(multiply(mask)) for tap, mask in zip(taps, masks, strict=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def variance(features: Tensor) -> Tensor:
    """A tap's variance over batch and positions, summed over its channels."""
    return features.float().var((0, 2, 3), correction=0).sum()


def margin(feature: Tensor) -> Tensor:
    """The mean of a channel's negative responses [1, C, 1, 1]; 0 where it has none."""
    negative = feature.clamp(max=0)
    return negative.sum((0, 2, 3), keepdim=True) / (feature < 0).sum((0, 2, 3), keepdim=True).clamp(min=1)


def margin_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance to max(teacher, margin), none where the student is below a target that is not positive."""
    student, teacher = student.float(), teacher.float()
    target = torch.maximum(teacher, margin(teacher))
    gap = torch.where((student <= target) & (target <= 0), 0.0, student - target)
    return gap.square().mean() / (target.square().mean() + 1e-12)


def salt_and_pepper(x: Tensor, share: float, rng: Generator) -> Tensor:
    """Turn `share` of each image's pixels white or black, half each, all channels alike."""
    draw = torch.rand(len(x), 1, *x.shape[2:], generator=rng).to(x.device)
    return torch.where(draw < share, (draw < share / 2).to(x.dtype), x)


@dataclass(frozen=True)
class RobustKd(Tuning):
    """Masks the model's features until little but the task is left of them, and distils these into a noisy student."""

    student: Literal["model", "fresh"] = "model"
    mask_steps: int = 100
    mask_lr: float = 0.05
    variance: float = 1.0
    features: float = 1.0
    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mask_steps >= 0, "mask_steps", self.mask_steps, "must be 0 or more")
        require(self.mask_lr > 0, "mask_lr", self.mask_lr, "must be above 0")
        for key in ("variance", "features"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must be 0 or more")
        require(0 <= self.noise <= 1, "noise", self.noise, "must be a fraction from 0 to 1")

    def check_model(self, model: Classifier) -> None:
        """Masks act through what comes after a tap: a tap beside the forward path can't be masked."""
        probe = deepcopy(model).eval()
        x = torch.rand(1, *model.shape, generator=torch.Generator().manual_seed(0)).to(model.mean.device)
        with torch.no_grad():
            logits, taps = probe.with_taps(x)
            for at, name in enumerate(model.taps):
                masks = [torch.full((f.shape[1],), float(at != i), device=f.device) for i, f in enumerate(taps)]
                with masked(probe, masks):
                    acts = not torch.equal(probe(x), logits)
                require(acts, "", f"robust_kd on a model whose tap {name} feeds no later layer", "can't be masked")

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        self.check_model(model)
        teacher = frozen_copy(model)
        masks = self.masks(teacher, clean, ctx)
        student = deepcopy(model)
        if self.student == "fresh":
            initialise(student.cpu(), ctx.rng)
            student.to(ctx.device)
        return self.tuned(student, clean, ctx, ctx.rng, objective=self._objective(teacher, masks, ctx.rng)), {}

    def masks(self, teacher: Classifier, clean: Samples, ctx: ServerContext) -> list[Tensor]:
        """One mask [C] a tap, trained by projected Adam."""
        with torch.no_grad():
            _, taps = teacher.with_taps(next(clean.chunks(self.batch_size))[0])
        usual = [variance(features) + 1e-12 for features in taps]
        masks = [torch.ones(f.shape[1], device=f.device, requires_grad=True) for f in taps]

        def detoxify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            model.eval()  # `fit` sets train mode, and the teacher's statistics must stay
            with masked(teacher, masks):
                logits, features = teacher.with_taps(x)  # the hooks that look run after those that mask
            shares = torch.stack([variance(f) / before for f, before in zip(features, usual, strict=True)])
            return F.cross_entropy(logits, y) + self.variance * shares.mean()

        def project(_model: nn.Module) -> None:
            with torch.no_grad():
                for mask in masks:
                    mask.clamp_(0, 1)

        if self.mask_steps:
            optimizer = torch.optim.Adam(masks, lr=self.mask_lr)
            samples = clean.then(ctx.augment) if self.augment else clean
            ctx.fit(
                teacher,
                samples,
                optimizer,
                epochs=0,
                min_steps=self.mask_steps,
                batch_size=self.batch_size,
                rng=ctx.rng,
                objective=detoxify,
                after_step=[project],
            )
        return [mask.detach() for mask in masks]

    def _objective(self, teacher: Classifier, masks: Sequence[Tensor], rng: Generator) -> Objective:
        def objective(student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            assert isinstance(student, Classifier)
            with torch.no_grad(), masked(teacher, masks):
                _, goals = teacher.with_taps(x)
            logits, taps = student.with_taps(salt_and_pepper(x, self.noise, rng))
            gaps = torch.stack([margin_distance(s, t) for s, t in zip(taps, goals, strict=True)])
            return F.cross_entropy(logits, y) + self.features * gaps.sum()

        return objective
