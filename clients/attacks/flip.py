"""FLIP (Jha, Hayase & Oh, NeurIPS 2023, "Label Poisoning Is All You Need"): a backdoor by wrong labels alone.

An expert θ is trained on the attacker's images and stamped copies of them that are called the target. Along its way,
soft labels q = softmax(ℓ) of the *clean* images are learned so that training on them takes the same steps:

    min_ℓ ‖θ_s − θ_{t+1}‖² / ‖θ_{t+1} − θ_t‖²,   θ_s = θ_t − η ∇L(clean images, q),   θ_{t+1} = θ_t − η ∇L(expert's)

which for one step of plain SGD is ‖g_s(q) − g_e‖²/‖g_e‖². Then the share `poison_rate` of images whose wrong logit most
exceeds the right one is called by that wrong class; images stay as they are. From the paper: the objective, the margin.
Deviations: one expert, which starts from the received model; plain SGD; gradients in evaluation mode; labels learn by
Adam. On digits the labels' steps do come nearer to the expert's, but hardly any backdoor follows. Four `passes` cost
about ten benign trainings of two epochs.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from clients.attacks.data_poisoning import DataPoisoning
from clients.attacks.model_replacement import ModelReplacement
from fl_sim.backdoor import Backdoor
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, State
from fl_sim.samples import Samples


def mismatch(student: list[Tensor], expert: list[Tensor]) -> Tensor:
    """‖g_s − g_e‖²/‖g_e‖² over all parameters."""
    gap = torch.stack([(s - e).square().sum() for s, e in zip(student, expert, strict=True)]).sum()
    return gap / torch.stack([e.square().sum() for e in expert]).sum().clamp(min=1e-12)


def flipped(logits: Tensor, labels: Tensor, share: float) -> Tensor:
    """New labels: the round(share · n) with the largest margin max_{c≠y} ℓ_c − ℓ_y take that wrong class."""
    right = F.one_hot(labels, logits.shape[1]).bool()
    best, wrong = logits.masked_fill(right, -torch.inf).max(1)
    chosen = (best - logits[right]).topk(round(share * len(labels))).indices
    new = labels.clone()
    new[chosen] = wrong[chosen]
    return new


@dataclass(frozen=True)
class Flip(ModelReplacement):
    """Changes the labels of a share `poison_rate` of its images, so that they train like stamped ones, and no pixel."""

    stamps: ClassVar[bool] = False

    boost: float | Literal["auto"] = 1.0
    passes: int = 4
    expert_lr: float = 0.1
    label_lr: float = 0.3
    confidence: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mode == "dataset", "mode", self.mode, "must be dataset: labels are chosen once, for all images")
        require(self.passes >= 1, "passes", self.passes, "must be 1 or more")
        require(self.expert_lr > 0, "expert_lr", self.expert_lr, "must be above 0")
        require(self.label_lr > 0, "label_lr", self.label_lr, "must be above 0")
        require(self.confidence > 0, "confidence", self.confidence, "must be above 0")

    def poisoned(
        self, model: Classifier, samples: Samples, ctx: ClientContext
    ) -> tuple[Samples, Backdoor, State | None]:
        # At a rate of 0 nothing is stamped; a trigger that learns has learned.
        _, backdoor, record = DataPoisoning(self.client, 0.0).poisoned(model, samples, ctx)
        logits = self.matched(model, samples, backdoor, ctx.rng)
        labels = flipped(logits, samples.labels, self.poison_rate)
        return Samples(samples.images, labels, samples.transforms), backdoor, record

    def matched(self, model: Classifier, samples: Samples, backdoor: Backdoor, rng: Generator) -> Tensor:
        """The label logits [N, K] whose training steps resemble the expert's; the model is left alone."""
        expert = deepcopy(model).eval()
        weights = [parameter for parameter in expert.parameters() if parameter.requires_grad]
        plain = Samples(samples.images, samples.labels)
        logits = self.confidence * F.one_hot(samples.labels, backdoor.classes).float()
        logits.requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=self.label_lr)
        for _ in range(self.passes):
            for at in torch.randperm(len(plain), generator=rng).to(logits.device).split(32):
                [(x, y)] = plain[at].chunks(len(at))
                victims = backdoor.victims(x, y)
                stamped, wanted = backdoor.stamp(x[victims]), backdoor.goal.labels(y[victims], backdoor.classes)
                optimizer.zero_grad()
                with sdpa_kernel(SDPBackend.MATH):  # the fast kernels of attention have no second derivatives
                    loss = F.cross_entropy(expert(torch.cat([x, stamped])), torch.cat([y, wanted]))
                    steps = list(torch.autograd.grad(loss, weights))
                    soft = F.cross_entropy(expert(x), logits[at].softmax(1))
                    ours = list(torch.autograd.grad(soft, weights, create_graph=True))
                    [gradient] = torch.autograd.grad(mismatch(ours, steps), [logits])
                logits.grad = gradient
                optimizer.step()
                with torch.no_grad():
                    for weight, step in zip(weights, steps, strict=True):
                        weight.sub_(step, alpha=self.expert_lr)
        return logits.detach()
