"""I-BAU: unlearning an adversarial perturbation by implicit hypergradients (Zeng et al., ICLR 2022).

min over weights θ of H(δ*(θ), θ), where δ* is the one perturbation of all images that misleads the most: δ* = argmin
−CE(f_θ(x + δ), f's own labels) + c·‖δ‖². Since δ* moves with θ, the gradient has a second part, dH/dθ = ∂_θ H +
(∂δ*/∂θ)ᵀ ∂_δ H, found by `terms` fixed-point iterations of the inner gradient step Φ = δ − η ∂_δ inner: v ← (∂_δ Φ)ᵀ
v + ∂_δ H, then dH/dθ = ∂_θ H + (∂_θ Φ)ᵀ v.

From the official code: 5 rounds, in each δ from zero by one ascent epoch of rate 10 and then one epoch of outer
steps; Adam 1e-3, batch 100, c = 1e-3, η = 0.1, 5 terms, the model in evaluation mode. Deviations: the perturbation is
added to a share `share` of each outer batch, by default a tenth; the paper's H has all, the official code 1 %, which
in a batch of a hundred is one image; `min_steps` repeats the rounds on a small clean set, and `inner_min_steps` the
ascent, at rate 1: an epoch of a clean set of 144 images is two steps, after which δ misleads hardly anyone, and after
twenty nearly every image is misread; δ is projected onto a ball, as in the paper and commented out in the code, with
a `radius` that is a root mean square: 0.18 is an L2 norm of 10 on 32×32×3 pixels, and stays as visible at any other
size. η is 0.01, for at 0.1 in pixels the implicit part outweighs all else and the clean task is lost. No selection,
so the whole clean set is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fl_sim.distillation import frozen_copy
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext, State
from fl_sim.samples import Samples, batch_sizes

Loss = Callable[[Tensor], Tensor]
"""A loss as a function of the perturbation; of the weights too, which it reads where they are."""


def implicit_gradient(
    inner: Loss, slope: Tensor, delta: Tensor, weights: Sequence[Tensor], *, rate: float, terms: int
) -> list[Tensor]:
    """(∂_θ Φ)ᵀ v with v the sum of `terms` terms of the Neumann series Σ ((∂_δ Φ)ᵀ)^k · slope, slope = ∂_δ H."""
    delta = delta.detach().requires_grad_()
    [inner_slope] = torch.autograd.grad(inner(delta), delta, create_graph=True)
    mapped = delta - rate * inner_slope
    v = torch.zeros_like(slope)
    for _ in range(terms):
        [carried] = torch.autograd.grad(mapped, delta, grad_outputs=v, retain_graph=True)
        v = carried + slope
    parts = torch.autograd.grad(mapped, list(weights), grad_outputs=v, allow_unused=True)
    return [torch.zeros_like(w) if part is None else part for w, part in zip(weights, parts, strict=True)]


def within_ball(delta: Tensor, radius: float) -> Tensor:
    """The nearest perturbation whose root mean square is at most `radius`."""
    return delta * (radius / delta.square().mean().sqrt().clamp_min(1e-12)).clamp(max=1)


@dataclass(frozen=True)
class Ibau:
    """Finds the perturbation that misleads the model the most, and trains it away with implicit gradients."""

    rounds: int = 5
    min_steps: int = 100
    batch_size: int = 100
    lr: float = 1e-3
    share: float = 0.1
    terms: int = 5
    inner_lr: float = 1.0
    inner_min_steps: int = 20
    fixed_point_lr: float = 0.01
    penalty: float = 1e-3
    radius: float = 0.18
    augment: bool = True

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds", self.rounds, "must be 1 or more")
        require(self.min_steps >= 0, "min_steps", self.min_steps, "must be 0 or more")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "must be 2 or more")
        require(self.inner_min_steps >= 0, "inner_min_steps", self.inner_min_steps, "must be 0 or more")
        require(0 < self.share <= 1, "share", self.share, "must be above 0 and at most 1")
        require(self.terms >= 0, "terms", self.terms, "must be 0 or more")
        require(self.penalty >= 0, "penalty", self.penalty, "must be 0 or more")
        for key in ("lr", "inner_lr", "fixed_point_lr", "radius"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be above 0")

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        erased = deepcopy(model)
        training = clean.then(ctx.augment) if self.augment else clean
        optimizer = torch.optim.Adam(erased.parameters(), lr=self.lr)
        a_round = len(batch_sizes(len(clean), self.batch_size))
        for _ in range(max(self.rounds, -(-self.min_steps // a_round))):
            delta = self.perturbation(erased, training, ctx)
            ctx.fit(
                erased,
                training,
                optimizer,
                epochs=1,
                batch_size=self.batch_size,
                rng=ctx.rng,
                objective=partial(self.unlearning, delta),
            )
        return erased, {}

    def perturbation(self, model: Classifier, training: Samples, ctx: ServerContext) -> Tensor:
        """δ after one epoch of ascent from zero, away from what the model itself says."""
        frozen = frozen_copy(model)
        delta = torch.zeros(model.shape, device=training.labels.device)
        epochs = -(-self.inner_min_steps // len(batch_sizes(len(training), self.batch_size)))
        for _ in range(max(1, epochs)):
            for x, _ in training.batches(self.batch_size, ctx.rng):
                said = frozen(x).argmax(1)
                delta.requires_grad_()
                [slope] = torch.autograd.grad(self.misleading(frozen, x, said, delta), delta)
                delta = within_ball((delta - self.inner_lr * slope).detach(), self.radius)
        return delta

    def misleading(self, model: nn.Module, x: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
        """The inner loss, to be minimised over δ."""
        return self.penalty * delta.square().sum() - F.cross_entropy(model(x + delta), labels)

    def unlearning(self, delta: Tensor, student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """H on a batch, whose gradient is the whole hypergradient."""
        student.eval()  # the running statistics are neither used up nor moved by perturbed images
        delta = delta.detach().requires_grad_()
        count = max(1, round(self.share * len(x)))
        patched = torch.cat([x[:count] + delta, x[count:]])
        outer = F.cross_entropy(student(patched), y)
        if not self.terms:
            return outer
        [slope] = torch.autograd.grad(outer, delta, retain_graph=True)
        weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
        with sdpa_kernel(SDPBackend.MATH):  # the fast kernels of attention have no second derivatives
            implicit = implicit_gradient(
                partial(self.misleading, student, x, y), slope, delta, weights,
                rate=self.fixed_point_lr, terms=self.terms,
            )  # fmt: skip
        # g·(w − w₀) has the value 0 and the gradient g: it carries the implicit part through `fit`'s backward pass.
        return outer + torch.stack([(g * (w - w.detach())).sum() for g, w in zip(implicit, weights, strict=True)]).sum()
