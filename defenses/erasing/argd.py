"""ARGD: attention relation graph distillation (Xia et al., IJCAI 2022).

As in NAD a fine-tuned teacher guides the model; beside the attention maps (nodes) their relations are aligned:
L = CE + L_node + L_edge + L_embed. L_node = Σ_l β_l ‖Â_S^l − Â_T^l‖²; L_edge: for each pair of taps the squared
distance of their maps (the larger pooled to the smaller), divided by the batch's maximum, student's against teacher's;
L_embed: teacher taps attend to student taps, Σ_t Σ_s a_ts · mean (v_s − v_t)².

From the paper: 5 % clean, 10 epochs, SGD 0.1 (below epoch 3), 0.01 (below 6), 0.001, Nesterov 0.9, weight decay 1e-4,
batch 64, weights 1/1/1. Deviations: β = 1.95/19.5/31.25 on the squared distance equal the official 2000/5000/2000 on
the mean square at 32×32 (β/(H·W), as for `nad`); `min_steps`; Cutout is left to `data.augment`. The official code
leaves the embedding's projections out of its optimiser, a fixed random projection: `train_projections: false` does so.
Its hard-coded WRN-40-2 teacher is not repeated: the teacher is the fine-tuned model, as the paper says.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from fl_sim.attention import attention_loss, attention_map
from fl_sim.distillation import same_size
from fl_sim.errors import require
from fl_sim.models.classifier import Classifier, reset_linear
from fl_sim.protocols import ServerContext, State
from fl_sim.samples import Samples
from fl_sim.training import Objective, decayed, sgd
from fl_sim.tuning import Tuning


def edges(features: Sequence[Tensor]) -> Tensor:
    """For each pair of taps ‖Â_i − Â_j‖² of each sample, divided by the batch's largest: [pairs, B]."""
    maps = [attention_map(f).unflatten(1, f.shape[2:]) for f in features]
    gaps = [(a - b).square().flatten(1).sum(1) for a, b in (same_size(*pair) for pair in combinations(maps, 2))]
    distances = torch.stack(gaps).clamp(min=1e-12)
    return distances / distances.amax(1, keepdim=True)


class Embedding(nn.Module):
    """L_embed: which student tap each teacher tap should be compared with, and how far the two are apart."""

    def __init__(self, taps: int, rng: Generator, width: int = 128) -> None:
        super().__init__()

        def projections() -> nn.ModuleList:
            return nn.ModuleList(nn.Sequential(nn.Linear(1, width), nn.BatchNorm1d(width)) for _ in range(taps))

        self.taps, self.width = taps, width
        self.keys, self.queries = projections(), projections()
        self.bilinear = nn.Sequential(nn.Linear(width, width * taps), nn.BatchNorm1d(width * taps))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                reset_linear(module, rng)
        scale = (2 / (taps + width)) ** 0.5  # Glorot's
        self.student_places = nn.Parameter(scale * torch.randn(taps, width, generator=rng))
        self.teacher_places = nn.Parameter(scale * torch.randn(taps, width, generator=rng))

    def attention(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """softmax over student taps of (key·query + P_T P_Sᵀ)/√width: [B, teacher taps, student taps]."""
        means = [[attention_map(f).mean(1, keepdim=True) for f in side] for side in (student, teacher)]
        keys = torch.stack([F.relu(p(m)) for p, m in zip(self.keys, means[0], strict=True)], 1)  # [B, S, width]
        queries = torch.stack([p(m) for p, m in zip(self.queries, means[1], strict=True)], 1)  # [B, T, width]
        towards = self.bilinear(keys.flatten(0, 1)).view(len(keys), self.taps, self.taps, self.width)
        match = torch.einsum("bstw,btw->bts", towards, queries) + self.teacher_places @ self.student_places.T
        attention: Tensor = torch.softmax(match / self.width**0.5, 2)
        return attention

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        attention = self.attention(student, teacher)
        terms = [
            attention[:, t, s] * (_value(own, goal) - _value(goal, goal)).square().mean(1)
            for t, goal in enumerate(teacher)
            for s, own in enumerate(student)
        ]
        return torch.stack(terms).sum(0).mean()


def _value(features: Tensor, goal: Tensor) -> Tensor:
    """mean_c F_c², pooled to the goal's size, flattened, of unit length."""
    maps = features.float().square().mean(1, keepdim=True)
    value: Tensor = F.normalize(F.adaptive_avg_pool2d(maps, (goal.shape[2], goal.shape[3])).flatten(1), dim=1)
    return value


def relation_distillation(
    teacher: Classifier, embedding: Embedding, nodes: Sequence[float], edge: float, embed: float
) -> Objective:
    """CE + L_node + edge · L_edge + embed · L_embed towards a frozen teacher."""
    teacher.eval()

    def objective(student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(student, Classifier)
        logits, ours = student.with_taps(x)
        with torch.no_grad():
            _, theirs = teacher.with_taps(x)
        loss = F.cross_entropy(logits, y) + attention_loss(ours, theirs, nodes)
        loss = loss + edge * F.mse_loss(edges(ours), edges(theirs))
        embedded: Tensor = embedding(ours, theirs)
        return loss + embed * embedded

    return objective


@dataclass(frozen=True)
class Argd(Tuning):
    """Distils a fine-tuned teacher's attention maps and the relations between them into the model."""

    lr_decay_epochs: int = 3
    lr_decays: int | None = 2
    nesterov: bool = True
    teacher_epochs: int = 10
    nodes: tuple[float, ...] = (1.95, 19.5, 31.25)
    edge: float = 1.0
    embed: float = 1.0
    train_projections: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.teacher_epochs >= 1, "teacher_epochs", self.teacher_epochs, "must be 1 or more")
        usable = bool(self.nodes) and all(weight >= 0 for weight in self.nodes)
        require(usable, "nodes", list(self.nodes), "must be a list of one or more numbers, none below 0")
        for key in ("edge", "embed"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must be 0 or more")

    def check_model(self, model: Classifier) -> None:
        """Edges join taps, so there must be two."""
        require(len(model.taps) >= 2, "", f"argd on a model with {len(model.taps)} attention tap", "needs two or more")

    def erase(
        self, model: Classifier, clean: Samples | None, state: State, ctx: ServerContext
    ) -> tuple[Classifier, State]:
        assert clean is not None
        self.check_model(model)
        teacher = self.tuned(model, clean, ctx, ctx.rng, epochs=self.teacher_epochs)
        embedding = Embedding(len(model.taps), ctx.rng).to(ctx.device)
        student = deepcopy(model)
        optimizer = sgd(
            student, self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )
        if self.train_projections:
            optimizer.add_param_group({"params": list(embedding.parameters())})
        ctx.fit(
            student,
            clean.then(ctx.augment) if self.augment else clean,
            optimizer,
            epochs=self.epochs,
            batch_size=self.batch_size,
            rng=ctx.rng,
            objective=relation_distillation(teacher, embedding, self.nodes, self.edge, self.embed),
            min_steps=self.min_steps,
            schedule=decayed(
                self.lr_decay,
                self.lr_decay_epochs / self.epochs,
                float("inf") if self.lr_decays is None else self.lr_decays,
            ),
        )
        return student, {}
