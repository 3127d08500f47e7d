"""How the server keeps its signals: what an erasing policy that watches may decide by."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_sim.metrics import CHUNK
from fl_sim.protocols import Signals
from fl_sim.samples import Samples


@torch.no_grad()
def clean_score(model: nn.Module, clean: Samples, *, chunk: int = CHUNK) -> tuple[float, float]:
    """Accuracy and mean cross-entropy on the clean set, in one pass."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, device=clean.labels.device)
    for x, y in clean.chunks(chunk):
        logits = model(x)
        sums += torch.stack([(logits.argmax(1) == y).sum(), F.cross_entropy(logits, y, reduction="sum")])
    model.train(was_training)
    right, loss = (sums / len(clean)).tolist()
    return right, loss


def noted(signals: Signals, step: Tensor, kept: Tensor | None, score: tuple[float, float] | None) -> Signals:
    """The signals with one more round: its step, which rows its rule kept, and the clean set's accuracy and loss."""
    rejected = 0.0 if kept is None else 1 - float(kept.float().mean())
    accuracies, losses = ((), ()) if score is None else ((score[0],), (score[1],))
    return replace(
        signals,
        rejected=(*signals.rejected, rejected),
        steps=(*signals.steps, float(step.norm())),
        accuracies=signals.accuracies + accuracies,
        losses=signals.losses + losses,
        rounds_since_erasing=signals.rounds_since_erasing + 1,
    )


def noted_erasing(signals: Signals, seconds: float) -> Signals:
    """After an erasing, which counts the rounds anew. The past stays: after it alone an ongoing attack looks usual."""
    return replace(signals, rounds_since_erasing=0, erasing_seconds=(*signals.erasing_seconds, seconds))
