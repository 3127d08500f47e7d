"""BackdoorIndicator (Li & Dai, USENIX Security 2024): plant a task into the model and see in which updates it survives.

After each step the server trains the global model to put out-of-distribution images, random labels y, into those
classes: L = CE(model(x), y) + μ/2 · ‖w − w_before‖₂. Honest training forgets that; training a backdoor keeps alive
whatever else leads strange images to its target. A client whose model still puts `threshold` of any one class's
indicator images there is rejected; the others are clipped to their median length and averaged.

From the official code: 800 images, 200 epochs, SGD 0.005, momentum 0.9, weight decay 5e-4, batch 64, μ = 0.1, 95 %;
batch statistics are not planted, but the check uses those of the planting. Deviations: the images are noise, smoothed
at random scales, because the server has no foreign data set (honest clients whose models put all noise into one class
are rejected wrongly); the learning rate is constant; the task is planted after a step, not before the next, so
recorded scores and the final model carry it. In the first round, and where the model that was sent out no longer
knows its task (an eraser came in between, a server rate far from 1), nobody is rejected. The plant is part of the
step, so keep `server_optimizer=plain`. Memory: a model and the images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from defenses.aggregation.geometry import among_finite
from defenses.aggregation.local_models import global_model, local_models, outputs
from defenses.aggregation.mean import shares_of
from defenses.aggregation.norm_clipping import clipping_factors
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import Aggregate, ServerContext, State
from fl_sim.samples import Samples
from fl_sim.training import sgd


def noise_images(count: int, shape: tuple[int, int, int], rng: Generator) -> Tensor:
    """Images of uniform noise, a third each at full, half and quarter resolution."""
    channels, height, width = shape
    parts = []
    for index, part in enumerate(torch.arange(count).chunk(3)):
        size = (max(height >> index, 1), max(width >> index, 1))
        parts.append(F.interpolate(torch.rand(len(part), channels, *size, generator=rng), (height, width)))
    return torch.cat(parts)


def knowledge(model: Classifier, task: Samples, classes: int) -> Tensor:
    """The share of each class's images that the model puts there."""
    hits = outputs(model, task.images).argmax(1) == task.labels
    found = torch.bincount(task.labels, hits.float(), minlength=classes)
    return found / torch.bincount(task.labels, minlength=classes).clamp(min=1)


@dataclass(frozen=True)
class Indicator:
    """Rejects clients in whose models a planted task on strange images is still alive."""

    samples: int = 800
    epochs: int = 200
    batch_size: int = 64
    lr: float = 0.005
    momentum: float = 0.9
    weight_decay: float = 5e-4
    mu: float = 0.1
    threshold: float = 0.95

    def __post_init__(self) -> None:
        require(self.samples >= 2, "samples", self.samples, "must be 2 or more")
        require(self.epochs >= 1, "epochs", self.epochs, "must be 1 or more")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "must be 2 or more")
        require(self.lr > 0, "lr", self.lr, "must be above 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "must be from 0 to below 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")
        require(self.mu >= 0, "mu", self.mu, "must be 0 or more")
        require(0 < self.threshold <= 1, "threshold", self.threshold, "must be a fraction above 0, at most 1")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        seed = int(state.get("seed", torch.randint(2**31 - 1, (1,), generator=ctx.rng).item()))
        model = global_model(ctx)
        task = self.task(seed, model.shape, ctx)
        kept = torch.tensor(self.judge(deltas, task, state, ctx), device=deltas.device)
        norms = deltas.norm(dim=1)
        most = norms[kept].quantile(0.5) if kept.any() else 0.0
        mean = (shares_of(weights, kept) * clipping_factors(norms, most)) @ deltas
        statistics = self.plant(model, mean, task, ctx)
        step = ctx.layout.read(model)[: len(mean)] - ctx.vector[: len(mean)]
        return Aggregate(step, kept, {"seed": seed, "statistics": statistics})

    def task(self, seed: int, shape: tuple[int, int, int], ctx: ServerContext) -> Samples:
        """The indicator images, the same in every round, and as many labels of each class."""
        rng = torch.Generator().manual_seed(seed)
        images = noise_images(self.samples, shape, rng)
        labels = (torch.arange(self.samples) % ctx.classes)[torch.randperm(self.samples, generator=rng)]
        return Samples(images.to(ctx.vector.device), labels.to(ctx.vector.device))

    def judge(self, deltas: Tensor, task: Samples, state: State, ctx: ServerContext) -> list[bool]:
        """Whom to keep: everyone whose model has forgotten the task, or everyone if the model sent out had."""
        planted = state.get("statistics")
        buffers = planted.to(ctx.vector) if isinstance(planted, Tensor) else None
        # On average over all classes: a model that puts all strange images into one knows that one perfectly.
        if buffers is None or knowledge(global_model(ctx, buffers), task, ctx.classes).mean() < self.threshold:
            return [True] * len(deltas)
        models = local_models(deltas, ctx, buffers)
        return [bool(knowledge(model, task, ctx.classes).max() < self.threshold) for model in models]

    def plant(self, model: Classifier, mean: Tensor, task: Samples, ctx: ServerContext) -> Tensor:
        """Train the task into the model after the step `mean`, in place; returns the batch statistics that left."""
        after = ctx.vector.clone()
        after[: len(mean)] += mean
        ctx.layout.load(model, after)
        before = [parameter.detach().clone() for parameter in model.parameters()]

        def objective(trained: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            squares = [(now - old).square().sum() for now, old in zip(trained.parameters(), before, strict=True)]
            # The root has no finite slope at zero, where the training starts.
            return F.cross_entropy(trained(x), y) + self.mu / 2 * (torch.stack(squares).sum() + 1e-12).sqrt()

        optimizer = sgd(model, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        fit = ctx.fit(
            model, task, optimizer, epochs=self.epochs, batch_size=self.batch_size, rng=ctx.rng, objective=objective
        )
        assert fit.steps > 0
        return ctx.layout.read(model)[ctx.layout.parameters :].clone()
