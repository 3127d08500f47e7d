"""NTD, non-transferability enabled detection (Li et al., TIFS 2024; arXiv 2111.11157).

A trigger rules the model that it was planted in and no other. An independent network f, the feature extractor, is shown
the input and clean images of the class c that the model under test predicts; a stamped input looks unlike them:

    score(x) = 1 − mean_{z clean, of class c} cos(f(x), f(z))

A reconstruction from the abstract. The paper's extractor is a free pre-trained model and its images are a random group
of the class; ours is a network of the run's architecture, drawn anew and trained on four fifths of the clean set, and
the group is all clean images of the class, or the `nearest` of them. The fifth that is left says how good the extractor
is (`extractor_acc`): on a clean set of a hundred images it is weak, and so then is the detector. f is the input of the
last layer. The extractor depends on no model under test, so one serves the whole run. A class that has no clean images
gets a similarity of 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fl_sim.distillation import with_features
from fl_sim.errors import require
from fl_sim.metrics import CHUNK, accuracy
from fl_sim.models.classifier import Classifier, initialise
from fl_sim.protocols import Screen, ServerContext, State
from fl_sim.samples import Samples
from fl_sim.tuning import Tuning

STRENGTH = "extractor_acc"


@torch.no_grad()
def directions(extractor: Classifier, x: Tensor) -> Tensor:
    """Features of length one [N, D]."""
    return F.normalize(with_features(extractor, x)[1], dim=1)


def similarity(features: Tensor, group: Tensor, nearest: int | None) -> Tensor:
    """The mean cosine [N] to the rows of a group [M, D] of directions, or to the `nearest` ones; 0 to an empty one."""
    if not len(group):
        return features.new_zeros(len(features))
    cosines = features @ group.T
    if nearest is not None:
        cosines = cosines.topk(min(nearest, len(group)), dim=1).values
    return cosines.mean(1)


def unlikeness(model: Classifier, extractor: Classifier, clean: Samples, nearest: int | None) -> Callable[..., Tensor]:
    """Pixels -> scores, given a trained extractor."""
    known = torch.cat([directions(extractor, x) for x, _ in clean.chunks(CHUNK)])

    @torch.no_grad()
    def score(x: Tensor) -> Tensor:
        features, answers = directions(extractor, x), model(x).argmax(1)
        scores = features.new_zeros(len(x))
        for label in answers.unique():
            these = answers == label
            scores[these] = 1 - similarity(features[these], known[clean.labels == label], nearest)
        return scores

    return score


@dataclass(frozen=True)
class Ntd(Tuning):
    """Compares an image with clean ones of its predicted class, in the eyes of a network trained on the clean set."""

    epochs: int = 20
    min_steps: int = 800
    lr_decay_epochs: int = 8
    weight_decay: float = 5e-4
    nearest: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        good = self.nearest is None or self.nearest >= 1
        require(good, "nearest", self.nearest, "must be null, which means all, or 1 or more")

    def screen(self, model: Classifier, state: State, ctx: ServerContext) -> Screen:
        assert ctx.clean is not None
        extractor, state = self._extractor(ctx.clean, state, ctx)
        strength = state[STRENGTH]
        assert isinstance(strength, float)
        return Screen(unlikeness(model, extractor, ctx.clean, self.nearest), state, {STRENGTH: strength})

    def _extractor(self, clean: Samples, state: State, ctx: ServerContext) -> tuple[Classifier, State]:
        """The one that was trained for an earlier model of the run, or a new one."""
        extractor = ctx.new_model()
        if state:
            extractor.load_state_dict({name: value for name, value in state.items() if isinstance(value, Tensor)})
            return extractor.eval(), state
        # Drawn anew on the CPU, where the generator is: a fresh model of the run starts where the global one did.
        extractor.cpu()
        initialise(extractor.body, ctx.rng)
        validation, training = clean.stratified(0.2, ctx.rng)
        extractor = self.tuned(extractor.to(ctx.device), training, ctx, ctx.rng).eval()
        return extractor, {**extractor.state_dict(), STRENGTH: accuracy(extractor, validation)}
