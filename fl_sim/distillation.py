"""What distillations share beyond attention maps: softened predictions, penultimate features, maps of one size."""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn
from torch.nn import functional as F

from fl_sim.models.classifier import Classifier


def softened_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL(softmax(teacher/T) ‖ softmax(student/T)), averaged over the batch (Hinton et al. 2015)."""
    targets = F.log_softmax(teacher / temperature, 1)
    gap = F.kl_div(F.log_softmax(student / temperature, 1), targets, reduction="batchmean", log_target=True)
    return temperature**2 * gap


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches of maps [..., H, W], the larger one average-pooled to the smaller one's size."""
    size = (min(a.shape[-2], b.shape[-2]), min(a.shape[-1], b.shape[-1]))
    pooled_a, pooled_b = (m if m.shape[-2:] == size else F.adaptive_avg_pool2d(m, size) for m in (a, b))
    return pooled_a, pooled_b


def with_features(model: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and what goes into the last layer [B, D], in one forward pass."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    hook = model.head.register_forward_pre_hook(keep)
    try:
        logits = model(x)
    finally:
        hook.remove()
    return logits, seen[0].float()


def frozen_copy(model: Classifier) -> Classifier:
    """A teacher: the model in eval mode, whose weights take no gradients; gradients still flow through it."""
    return deepcopy(model).eval().requires_grad_(False)
