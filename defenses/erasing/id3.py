"""ID3: increasing depth, distribution distillation and model soup (Zhang et al., J. Electronic Imaging 2022).

A fresh linear layer is put between body and classifier. Without the classifier, the deeper model (student) learns the
features that the model (teacher) gives to clean images, so that body and new layer must find a way to them together;
then the classifier is put back, several fine-tunings with different hyperparameters are run, and their weights are
averaged. A reconstruction of the abstract: it has no formula.

The new layer has no activation, so that it folds into the classifier, H(Wz + b) + h = (HW)z + (Hb + h), and the result
has the model's own layout: a deeper model could not be handed to clients. Ours are: the distribution loss, KL of the
features' softmax plus the squared distance of their batch means and of their standard deviations, each relative to the
teacher's; the settings, which are NAD's; the factors on rate and decay that make the soup's ingredients; the greedy
recipe (Wortsman et al., ICML 2022): best first on a fifth of the clean set, a model is added if accuracy there does not
fall. The soup's running statistics are measured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from fl_sim.batch_statistics import measure_statistics
from fl_sim.distillation import frozen_copy, softened_kl, with_features
from fl_sim.errors import require
from fl_sim.metrics import accuracy
from fl_sim.models.classifier import Classifier, reset_linear
from fl_sim.protocols import ServerContext, State
from fl_sim.samples import Samples
from fl_sim.tuning import Tuning

VALIDATION = 0.2
"""The share of the clean set on which the soup's ingredients are chosen."""


def distribution_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """Between two batches of features [B, D]: each sample's softmax, and the batch's mean and standard deviation."""
    moments = [
        (s - t).square().sum() / t.square().sum().clamp(min=1e-12)
        for s, t in ((student.mean(0), teacher.mean(0)), (_deviation(student), _deviation(teacher)))
    ]
    return softened_kl(student, teacher) + moments[0] + moments[1]


def _deviation(features: Tensor) -> Tensor:
    return torch.sqrt(features.var(0, correction=0) + 1e-8)  # the slack: a dead feature has no infinite gradient


def insert(model: Classifier, rng: Generator) -> Classifier:
    """A copy with a fresh linear layer before the last one."""
    deeper = deepcopy(model)
    layer = nn.Linear(deeper.head.in_features, deeper.head.in_features)
    reset_linear(layer, rng)
    deeper.set_submodule(_place(deeper), nn.Sequential(layer.to(deeper.head.weight.device), deeper.head))
    return deeper


def folded(deeper: Classifier) -> Classifier:
    """The same function with the inserted layer multiplied into the last one: the model's own layout again."""
    copy = deepcopy(deeper)
    place = _place(copy).rpartition(".")[0]
    inserted, head = copy.get_submodule(place).children()
    assert isinstance(inserted, nn.Linear)
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.bias.add_(head.weight @ inserted.bias)
        head.weight.copy_(head.weight @ inserted.weight)
    copy.set_submodule(place, head.requires_grad_(True))
    return copy


def _place(model: Classifier) -> str:
    names = {module: name for name, module in model.named_modules()}
    return str(names[model.head])


def greedy_soup(
    candidates: Sequence[Classifier],
    validate: Callable[[Classifier], float],
    refresh: Callable[[Classifier], None],
) -> Classifier:
    """Average the candidates, best first, leaving out each that would lower the accuracy."""
    ranked = sorted(candidates, key=validate, reverse=True)
    chosen, best = [ranked[0]], validate(ranked[0])
    soup = ranked[0]
    for candidate in ranked[1:]:
        mixed = deepcopy(soup)
        with torch.no_grad():
            each = zip(*(m.parameters() for m in (*chosen, candidate)), strict=True)
            for weight, ingredients in zip(mixed.parameters(), each, strict=True):
                weight.copy_(torch.stack(list(ingredients)).mean(0))
        refresh(mixed)
        if (reached := validate(mixed)) >= best:
            soup, best = mixed, reached
            chosen.append(candidate)
    return soup


@dataclass(frozen=True)
class Id3(Tuning):
    """Refits the features through an inserted layer, folds it into the classifier, averages several fine-tunings."""

    distillation_epochs: int = 10
    lr_factors: tuple[float, ...] = (1.0, 0.5)
    weight_decay_factors: tuple[float, ...] = (1.0, 5.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.distillation_epochs >= 1, "distillation_epochs", self.distillation_epochs, "must be 1 or more")
        usable = bool(self.lr_factors) and all(factor > 0 for factor in self.lr_factors)
        require(usable, "lr_factors", list(self.lr_factors), "must be a list of one or more numbers above 0")
        usable = bool(self.weight_decay_factors) and all(factor >= 0 for factor in self.weight_decay_factors)
        allowed = "must be a list of one or more numbers, none below 0"
        require(usable, "weight_decay_factors", list(self.weight_decay_factors), allowed)

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        validation, training = clean.stratified(VALIDATION, ctx.rng)
        refitted = self._refitted(model, training, ctx)
        variants = [
            replace(self, lr=rate * self.lr, weight_decay=decay * self.weight_decay).tuned(
                refitted, training, ctx, ctx.rng
            )
            for rate in self.lr_factors
            for decay in self.weight_decay_factors
        ]
        soup = greedy_soup(
            variants,
            lambda candidate: accuracy(candidate, validation),
            lambda candidate: measure_statistics(candidate, training, ctx.rng),
        )
        return soup, {}

    def _refitted(self, model: Classifier, training: Samples, ctx: ServerContext) -> Classifier:
        """The model with a distilled layer folded into its head."""
        teacher = frozen_copy(model)
        deeper = insert(model, ctx.rng)
        deeper.head.requires_grad_(False)  # it only marks the place: what goes into it is what is compared

        def objective(student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            assert isinstance(student, Classifier)
            with torch.no_grad():
                _, goal = with_features(teacher, x)
            return distribution_gap(with_features(student, x)[1], goal)

        return folded(self.tuned(deeper, training, ctx, ctx.rng, objective=objective, epochs=self.distillation_epochs))
