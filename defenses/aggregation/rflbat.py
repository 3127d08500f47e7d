"""RFLBAT (Wang et al. 2022): look at the updates in the plane of their two main directions, filter, cluster, filter.

1. Drop updates whose summed distances to all others in the plane exceed `first` times the median sum.
2. k-means, its k by the gap statistic; keep the cluster whose median of mean cosines between updates is *smallest*:
   colluders resemble each other more than honest clients on different data do. A cluster of one is never kept.
3. Drop again within that cluster, now by `second` times the median.

first = 10, second = 4, as in the paper. Deviations: at most two clusters by default, because in a cohort
of ten the gap statistic otherwise leaves honest clients alone, and the colluders win; the kept are averaged by their
weights; if all clusters have one member, all of step 1 is kept. Memory: chunks of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from defenses.aggregation.clustering import Labels, Numbers, cluster_count, k_means, to_numpy
from defenses.aggregation.geometry import among_finite, cosines_of, gram
from defenses.aggregation.mean import weighted_mean
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


def plane(products: Numbers) -> Numbers:
    """The updates' first two principal components, [K, 2], from their inner products."""
    centred = products - products.mean(0) - products.mean(1)[:, None] + products.mean()
    values, vectors = np.linalg.eigh(centred)
    top = vectors[:, ::-1][:, :2] * np.sqrt(values[::-1][:2].clip(min=0))
    return np.pad(top, ((0, 0), (0, 2 - top.shape[1])))


def near(points: Numbers, factor: float) -> npt.NDArray[np.bool_]:
    """Whose summed distance to all others is at most `factor` times the median one."""
    sums = np.linalg.norm(points[:, None] - points, axis=2).sum(1)
    return np.asarray(sums <= factor * np.median(sums))


def least_alike(labels: Labels, cosines: Numbers) -> npt.NDArray[np.bool_]:
    """Who is in the cluster of two or more whose members resemble each other least; everyone if there is none."""
    inside = [labels == name for name in np.unique(labels)]
    alike = {i: np.median(cosines[m][:, m].mean(1)) for i, m in enumerate(inside) if m.sum() > 1}
    return np.asarray(inside[min(alike, key=lambda i: alike[i])]) if alike else np.ones(len(labels), dtype=bool)


def accept(products: Tensor, first: float, second: float, most: int, rng: Generator) -> npt.NDArray[np.int64]:
    """The rows that pass all three steps."""
    points, cosines = plane(to_numpy(products)), to_numpy(cosines_of(products))
    rows = np.flatnonzero(near(points, first))
    labels = k_means(points[rows], cluster_count(points[rows], most, rng), rng)
    rows = rows[least_alike(labels, cosines[rows][:, rows])]
    return rows[near(points[rows], second)]


@dataclass(frozen=True)
class Rflbat:
    """Filters and clusters the updates' two principal components and keeps the most diverse cluster."""

    first: float = 10.0
    second: float = 4.0
    clusters: int = 2

    def __post_init__(self) -> None:
        require(self.first >= 1, "first", self.first, "must be 1 or more")
        require(self.second >= 1, "second", self.second, "must be 1 or more")
        require(self.clusters >= 1, "clusters", self.clusters, "must be 1 or more")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        rows = accept(gram(deltas), self.first, self.second, self.clusters, ctx.rng)
        kept = torch.zeros(len(deltas), dtype=torch.bool, device=deltas.device)
        kept[torch.from_numpy(rows).to(deltas.device)] = True
        return Aggregate(weighted_mean(deltas, weights, kept), kept)
