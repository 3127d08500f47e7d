"""Channel Lipschitz Pruning (Zheng et al., ECCV 2022): backdoor channels amplify most, which the weights alone show.

A channel's Lipschitz bound is σ_k = ‖W_k‖₂ · |γ_k| / √(var_k + ε), the spectral norm of its kernel as a matrix
[inputs, height·width] through batch normalisation; within each layer, channels with σ_k > mean + u·std are pruned (γ
= β = 0). Needs no data.

From the paper: u = 3 on CIFAR-10. Deviation: a convolution and its normalisation belong together if the one's output
is the other's input, seen in one forward pass; the official code pairs by order of definition, which in networks with
shortcuts pairs strangers. A normalisation of a sum (pre-activation networks have some) is left alone. Note that among
n channels no one can exceed its layer's mean by more than (n − 1)/√n standard deviations: with u = 3 a layer of fewer
than 11 channels is never pruned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext, State
from fl_sim.pruning import named_norms, scaled
from fl_sim.samples import Samples


def lipschitz_bounds(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """σ of each output channel."""
    assert norm.running_var is not None
    spectral: Tensor = torch.linalg.matrix_norm(conv.weight.detach().flatten(2), ord=2)
    return spectral * norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()


def outlying(bounds: Tensor, u: float) -> Tensor:
    """Which channels lie more than u standard deviations above their layer's mean."""
    return bounds > bounds.mean() + u * bounds.std()


@torch.no_grad()
def fed_by(model: Classifier) -> dict[str, nn.Conv2d]:
    """By name, the normalisations whose input is a convolution's output, with that convolution."""
    outputs: list[tuple[Tensor, nn.Conv2d]] = []
    pairs: dict[str, nn.Conv2d] = {}
    names = {norm: name for name, norm in named_norms(model).items()}

    def leave(module: nn.Module, _inputs: object, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        outputs.append((output, module))

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        pairs.update((names[module], conv) for output, conv in outputs if output is inputs[0])

    hooks = [each.register_forward_hook(leave) for each in model.modules() if isinstance(each, nn.Conv2d)]
    hooks += [norm.register_forward_pre_hook(enter) for norm in names]
    was_training = model.training
    try:
        model.eval()(torch.zeros(1, *model.shape, device=model.mean.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return pairs


@dataclass(frozen=True)
class Clp:
    """Prunes the channels whose weights amplify far more than their layer's other channels; needs no clean data."""

    u: float = 3.0

    needs_clean: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.u > 0, "u", self.u, "must be above 0")

    def check_model(self, model: Classifier) -> None:
        usable = bool(fed_by(model))
        require(usable, "", "a model without convolutions followed by BatchNorm2d", "works on such pairs only")

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        self.check_model(model)
        norms = named_norms(model)
        factors: dict[str, Tensor] = {}
        for name, conv in fed_by(model).items():
            keep = (~outlying(lipschitz_bounds(conv, norms[name]), self.u)).float()
            factors |= {f"{name}.weight": keep, f"{name}.bias": keep}
        return scaled(model, factors), {}
