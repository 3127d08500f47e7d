"""BCU: backdoor cleansing with unlabelled data (Pang et al., CVPR 2023).

Part of each layer's weights is drawn anew, more of it the deeper the layer, and the model then learns its predictions
back from its old self on clean images: L = T² · KL(softmax(teacher/T) ‖ softmax(student/T)). No label is used.

From the paper and its code: shares 0.01 for the stem, 0.01/0.03/0.09/0.27 for ResNet-18's groups, 0.10 for the last
layer, batch normalisation kept; T rising from 1 to 4; SGD 0.01 with a cosine schedule, momentum 0.9, batch 256, 100
epochs. Deviations: groups are what lies between attention taps, and a model with fewer takes the *last* shares, because
backdoors sit deep; T rises linearly over the steps; `min_steps`, 1,000 as on the paper's 2,500 images.
On digits with the small CNN it does not erase a patch (ASR stays 1.00); shares of 0.3/0.5/0.7 weaken it (0.72).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from fl_sim.annealing import Annealed
from fl_sim.distillation import softened_kl
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier, initialise
from fl_sim.protocols import ServerContext, State
from fl_sim.samples import Samples


def stages(model: Classifier) -> dict[str, int | None]:
    """Each convolution's and linear layer's name in the body, with the taps finished before it; None: the last layer.

    -1 marks the stem, the first layer of all.
    """
    order = [name for name, _ in model.body.named_modules()]
    found: dict[str, int | None] = {}
    for name, module in model.body.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            at = order.index(name)
            done = sum(order.index(tap) < at and not name.startswith(f"{tap}.") for tap in model.taps)
            found[name] = None if module is model.head else (done if found else -1)
    return found


def redraw(weight: Tensor, fresh: Tensor, share: float, rng: Generator) -> Tensor:
    """The weights with each replaced by a fresh one with probability `share`."""
    chosen = (torch.rand(weight.shape, generator=rng) < share).to(weight.device)
    return torch.where(chosen, fresh, weight)


def reinitialised(model: Classifier, stem: float, groups: tuple[float, ...], head: float, rng: Generator) -> Classifier:
    """A copy with a part of each layer's weights and biases drawn anew."""
    places = stages(model)
    last = max((stage for stage in places.values() if stage is not None), default=0)
    # The deepest group takes the last share; a deeper network than the shares know repeats the first.
    shares = [groups[max(len(groups) - 1 - last + stage, 0)] for stage in range(last + 1)]
    fresh = deepcopy(model).cpu()
    initialise(fresh, rng)
    copy = deepcopy(model)
    with torch.no_grad():
        for name, stage in places.items():
            share = head if stage is None else stem if stage < 0 else shares[stage]
            new = dict(fresh.body.get_submodule(name).named_parameters(recurse=False))
            for key, tensor in copy.body.get_submodule(name).named_parameters(recurse=False):
                tensor.copy_(redraw(tensor, new[key].to(tensor.device), share, rng))
    return copy


@dataclass(frozen=True)
class Bcu(Annealed):
    """Draws part of the weights anew, deeper layers more, then distils the old model's predictions without labels."""

    stem: float = 0.01
    groups: tuple[float, ...] = (0.01, 0.03, 0.09, 0.27)
    head: float = 0.10
    first_temperature: float = 1.0
    last_temperature: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("stem", "head"):
            require(0 <= getattr(self, key) <= 1, key, getattr(self, key), "must be a fraction from 0 to 1")
        usable = bool(self.groups) and all(0 <= share <= 1 for share in self.groups)
        require(usable, "groups", list(self.groups), "must be a list of one or more fractions from 0 to 1")
        for key in ("first_temperature", "last_temperature"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be above 0")

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        teacher = deepcopy(model).eval()
        student = reinitialised(model, self.stem, self.groups, self.head, ctx.rng)
        steps, done = self.steps(clean), 0

        def objective(learner: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            nonlocal done
            rise = (self.last_temperature - self.first_temperature) * done / steps
            done += 1
            with torch.no_grad():
                targets = teacher(x)
            return softened_kl(learner(x), targets, self.first_temperature + rise)

        return self.annealed(student, clean, ctx, objective), {}
