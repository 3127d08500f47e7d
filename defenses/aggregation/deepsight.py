"""DeepSight (Rieger et al., NDSS 2022): look at what each update does to the last layer and to random inputs.

Of client i, with the last layer's updates W, b and p over classes:
- NEUP: C_ip = e_ip² / Σ_p e_ip², e_ip = |b_p| + Σ_h |W_ph|. It is suspicious if it has at most half the median number
  of threshold exceedings, |{p: C_ip > max(0.01, 1/P) · max_p C_ip}|: trained for few classes.
- DDif: the mean over random images of softmax_p(local model)/softmax_p(global model), for several draws of images.
- the cosine distances of b.
HDBSCAN on each; distance 1 where two clients are apart, averaged over draws, then over the three; HDBSCAN on that
gives the clusters. One whose share of suspicious clients is a third or more is rejected whole, an outlier if it is
suspicious. The kept are clipped to the median length of all and averaged.

Deviations: local models run with the global batch statistics; the smallest cluster has 2 members (the paper's cohorts
are large); outliers of the single clusterings are apart from everyone, and who is
apart from all others in all of them is an outlier in the end; averaged by weights. Memory: a model,
`samples` images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from defenses.aggregation.clustering import Labels, Numbers, hdbscan, to_numpy
from defenses.aggregation.geometry import among_finite, cosines_of, gram
from defenses.aggregation.local_models import global_model, head_columns, local_models, outputs
from defenses.aggregation.mean import shares_of
from defenses.aggregation.norm_clipping import clipping_factors
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


def energies(weights: Tensor, biases: Tensor) -> Tensor:
    """NEUPs [K, P] from the last layer's updates [K, P, H] and [K, P]."""
    energy = (biases.abs() + weights.abs().sum(2)).square()
    return energy / energy.sum(1, keepdim=True).clamp(min=1e-30)


def exceedings(neups: Tensor) -> Tensor:
    """How many classes' energy is above a threshold relative to the client's largest, [K]."""
    share = max(0.01, 1 / neups.shape[1])
    return (neups > share * neups.amax(1, keepdim=True)).sum(1)


def divisions(deltas: Tensor, ctx: ServerContext, samples: int) -> Tensor:
    """DDifs [K, P] on images of uniform noise."""
    before = global_model(ctx)
    images = torch.rand(samples, *before.shape, generator=ctx.rng).to(deltas.device)
    reference = outputs(before, images).log_softmax(1)
    changed = (outputs(model, images).log_softmax(1) for model in local_models(deltas, ctx))
    return torch.stack([(after - reference).exp().mean(0) for after in changed])


def euclidean(points: Tensor) -> Numbers:
    """Pairwise distances."""
    wide = to_numpy(points)
    return np.asarray(np.linalg.norm(wide[:, None] - wide, axis=2))


def apart(labels: Labels) -> Numbers:
    """1 between clients of different clusters and from every outlier, 0 within a cluster."""
    same = (labels[:, None] == labels) & (labels >= 0) | np.eye(len(labels), dtype=bool)
    return np.asarray(1.0 - same)


def accepted(labels: Labels, suspicious: Tensor, threshold: float) -> Tensor:
    """Whom the suspicious in their cluster do not outweigh."""
    doubts = suspicious.cpu().numpy()
    kept = ~doubts
    for name in np.unique(labels[labels >= 0]):
        inside = labels == name
        kept[inside] = doubts[inside].mean() < threshold
    return torch.from_numpy(kept).to(suspicious.device)


@dataclass(frozen=True)
class DeepSight:
    """Clusters clients by last-layer energy, reaction to noise images and bias direction; drops poisoned clusters.

    The images are `draws` times `samples`.
    """

    samples: int = 20000
    draws: int = 3
    neighbours: int = 3
    threshold: float = 1 / 3

    def __post_init__(self) -> None:
        require(self.samples >= 1, "samples", self.samples, "must be 1 or more")
        require(self.draws >= 1, "draws", self.draws, "must be 1 or more")
        require(self.neighbours >= 1, "neighbours", self.neighbours, "must be 1 or more")
        require(0 < self.threshold <= 1, "threshold", self.threshold, "must be a fraction above 0, at most 1")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        weight, bias = (deltas[:, part] for part in head_columns(ctx))
        neups = energies(weight.unflatten(1, (ctx.classes, -1)), bias)
        counts = exceedings(neups)
        suspicious = counts <= counts.to(neups.dtype).quantile(0.5) / 2
        reactions = [divisions(deltas, ctx, self.samples) for _ in range(self.draws)]
        if not all(bool(each.isfinite().all()) for each in reactions):
            return self._without_overflow(deltas, weights, state, ctx, reactions)
        noise = [euclidean(each) for each in reactions]
        angles = to_numpy((1 - cosines_of(gram(bias))).clamp(min=0))
        merged = (
            np.mean([self._apart(each) for each in noise], axis=0) + self._apart(euclidean(neups)) + self._apart(angles)
        ) / 3
        labels = hdbscan(merged, 2, self.neighbours, single=True)
        labels[(merged + np.eye(len(merged)) > 1 - 1e-9).all(1)] = -1  # equal distances would be one cluster
        kept = accepted(labels, suspicious, self.threshold)
        norms = deltas.norm(dim=1)
        return Aggregate((shares_of(weights, kept) * clipping_factors(norms, norms.quantile(0.5))) @ deltas, kept)

    def _without_overflow(
        self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext, reactions: list[Tensor]
    ) -> Aggregate:
        """Among those whose model answers noise with numbers; the others are as good as NaN."""
        silent = ~torch.stack([each.isfinite().all(1) for each in reactions]).all(0)
        return self.aggregate(deltas.masked_fill(silent[:, None], float("nan")), weights, state, ctx)

    def _apart(self, distances: Numbers) -> Numbers:
        return apart(hdbscan(distances, 2, self.neighbours, single=False))
