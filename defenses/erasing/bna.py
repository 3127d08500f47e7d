"""BNA: correcting the distribution of neural activations (Li et al., 2023), folded into batch normalisation.

A trigger is reverse-engineered. In each channel, stamped images have mean μ_t and deviation σ_t where clean ones have
μ_c and σ_c; z' = (z − μ_t)·σ_c/σ_t + μ_c maps the one distribution onto the other. No weight is trained.

The paper applies z' to the images that it takes for triggered, by comparing the model's answers with and without it.
A federated model can't: it must stay one network of the same layout. So z is taken as the output of batch
normalisation, and z' folded into it, γ' = γ·σ_c/σ_t and β' = (β − μ_t)·σ_c/σ_t + μ_c, for clean and stamped images
alike. Deviations: hence it acts on clean images too, by a strength s ∈ [0, 1] (γ + s·(γ' − γ), β likewise), the
largest on a grid of tenths that keeps the accuracy on the held-out fifth within `tolerance`; layer by layer in
forward order, each with the earlier ones corrected; the paper's saturation is left out; needs batch normalisation.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fl_sim.errors import require
from fl_sim.inversion import Inversion
from fl_sim.metrics import CHUNK, accuracy
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ServerContext, State
from fl_sim.pruning import named_norms, require_norms
from fl_sim.samples import Samples

Moments = dict[str, tuple[Tensor, Tensor]]
"""The mean and standard deviation of each channel of a named layer's output."""

LEAST_DEVIATION = 1e-3


def correction(clean: tuple[Tensor, Tensor], stamped: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale a and shift b of z' = a·z + b; where stamped images don't vary, the scale is 1."""
    (mean_c, deviation_c), (mean_t, deviation_t) = clean, stamped
    flat = deviation_t < LEAST_DEVIATION
    scale = torch.where(flat, 1.0, deviation_c / deviation_t.clamp_min(LEAST_DEVIATION))
    return scale, mean_c - scale * mean_t


@torch.no_grad()
def moments(model: Classifier, images: Tensor, names: list[str]) -> Moments:
    """Of the named layers' outputs over images and positions; keys in forward order."""
    sums: dict[str, Tensor] = {}
    modules = {model.get_submodule(name): name for name in names}

    def add(module: nn.Module, _inputs: object, output: Tensor) -> None:
        z = output.float().transpose(0, 1).flatten(1).to(wide)
        seen = torch.stack([torch.full_like(z[:, 0], z.shape[1]), z.sum(1), z.square().sum(1)])
        sums[modules[module]] = sums.get(modules[module], torch.zeros_like(seen)) + seen

    wide = torch.float32 if images.device.type == "mps" else torch.float64
    hooks = [module.register_forward_hook(add) for module in modules]
    try:
        for x in images.split(CHUNK):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    means = {name: (total / count, squares / count) for name, (count, total, squares) in sums.items()}
    return {n: (m.float(), (s - m.square()).clamp_min(0).sqrt().float()) for n, (m, s) in means.items()}


@torch.no_grad()
def corrected(model: Classifier, clean: Tensor, stamped: Tensor, strength: float = 1.0) -> Classifier:
    """A copy whose normalisations give stamped pixels the statistics that the model gives clean ones."""
    copy = deepcopy(model).eval()
    norms = named_norms(copy)
    wanted = moments(copy, clean, list(norms))
    for name, target in wanted.items():
        scale, shift = correction(target, moments(copy, stamped, [name])[name])
        norm = norms[name]
        norm.bias.add_(strength * ((scale - 1) * norm.bias + shift))
        norm.weight.mul_(1 + strength * (scale - 1))
    return copy.train(model.training)


@dataclass(frozen=True)
class Bna:
    """Reverse-engineers a trigger and rescales every normalised channel so that stamped images look like clean ones."""

    tolerance: float = 0.05
    inversion: Inversion = field(default_factory=Inversion)

    def __post_init__(self) -> None:
        require(0 <= self.tolerance < 1, "tolerance", self.tolerance, "must be from 0 to below 1")

    def check_model(self, model: nn.Module) -> None:
        require_norms(model)

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        self.check_model(model)
        validation, training = clean.stratified(0.2, ctx.rng)
        found = self.inversion.invert(model, training, ctx.classes, ctx.rng)
        pixels = torch.cat([x for x, _ in training.chunks(CHUNK)])
        stamped = found.stamp(found.suspect)(pixels)
        floor = (1 - self.tolerance) * accuracy(model, validation)
        for tenths in range(10, 0, -1):
            candidate = corrected(model, pixels, stamped, tenths / 10)
            if accuracy(candidate, validation) >= floor:
                return candidate, {}
        return deepcopy(model), {}
