"""How PBE's image generator learns to make what the model was trained on, as in data-free distillation.

After Chen et al. (ICCV 2019: confident and diverse predictions), Yin et al. (CVPR 2020: the running statistics) and
Fang et al. (2019: what the student does not know yet).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from defenses.erasing.pbe_generator import ImageGenerator, draw
from fl_sim.batch_statistics import batch_norms
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext
from fl_sim.samples import Samples


def with_statistics(model: Classifier, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Logits, taps, and how far the batch's statistics are from the running ones, in units of the latter.

    The mean over layers and channels of (μ − μ̂)²/σ̂² + (σ/σ̂ − 1)²; zero for a model without batch normalisation.
    """
    gaps: list[Tensor] = []

    def compare(norm: nn.BatchNorm2d) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features = inputs[0].float()
            assert norm.running_mean is not None
            assert norm.running_var is not None
            usual = norm.running_var + norm.eps
            away = (features.mean((0, 2, 3)) - norm.running_mean).square() / usual
            spread = torch.sqrt((features.var((0, 2, 3), correction=0) + norm.eps) / usual)
            gaps.append((away + (spread - 1).square()).mean())

        return hook

    hooks = [norm.register_forward_pre_hook(compare(norm)) for norm in batch_norms(model)]
    try:
        logits, taps = model.with_taps(x)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, taps, torch.stack(gaps).mean() if gaps else logits.new_zeros(())


def image_loss(logits: Tensor, gap: Tensor, statistics: float, diversity: float) -> Tensor:
    """How badly generated images pass for training images: unsure, of few classes, of other statistics."""
    mean = logits.softmax(1).mean(0)
    entropy = -torch.sum(mean * torch.log(mean + 1e-8))
    return F.cross_entropy(logits, logits.argmax(1)) - diversity * entropy + statistics * gap


@dataclass(frozen=True)
class Pictures:
    """The image generator with what trains it."""

    generator: ImageGenerator
    optimizer: Optimizer
    statistics: float
    diversity: float

    def loss(self, logits: Tensor, gap: Tensor) -> Tensor:
        return image_loss(logits, gap, self.statistics, self.diversity)

    def step(self, made: Tensor, x: Tensor, loss: Tensor) -> None:
        """Train by a loss of x, the images cut off from the generator that made them; the loss's graph is kept."""
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        self.optimizer.zero_grad(set_to_none=True)
        made.backward(gradient)
        self.optimizer.step()


def blanks(count: int, device: torch.device) -> Samples:
    """What stands in for data where there is none: only its length is used, so an epoch is one batch."""
    return Samples(torch.zeros(count, 1, 1, 1, device=device), torch.zeros(count, dtype=torch.long, device=device))


def warm(pictures: Pictures, teacher: Classifier, blank: Samples, steps: int, ctx: ServerContext) -> None:
    """Train a new generator on the teacher alone, before a student looks at its images."""

    def objective(generator: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(generator, ImageGenerator)
        logits, _, gap = with_statistics(teacher, draw(generator, len(x), ctx.rng, x.device))
        return pictures.loss(logits, gap)

    ctx.fit(
        pictures.generator,
        blank,
        pictures.optimizer,
        epochs=0,
        min_steps=steps,
        batch_size=len(blank),
        rng=ctx.rng,
        objective=objective,
    )
