"""Clusterings that several rules use: HDBSCAN, k-means and how many clusters there are, mean shift."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import HDBSCAN, KMeans, MeanShift, estimate_bandwidth
from torch import Generator, Tensor

Numbers: TypeAlias = npt.NDArray[np.float64]
Labels: TypeAlias = npt.NDArray[np.int64]


def to_numpy(tensor: Tensor) -> Numbers:
    """A small tensor as doubles on the host."""
    return np.asarray(tensor.detach().cpu().double().numpy())


def hdbscan(distances: Numbers, smallest: int, neighbours: int, single: bool) -> Labels:
    """Cluster labels from a distance matrix, −1 for outliers (Campello, Moulavi & Sander, PAKDD 2013).

    A cluster has at least `smallest` members; density is measured by the distance to the `neighbours`-th *other*
    (scikit-learn counts the point itself); `single` allows that all are one cluster.
    """
    count = len(distances)
    if count < 2:
        return np.zeros(count, dtype=np.int64)
    fitted = HDBSCAN(
        min_cluster_size=max(smallest, 2),
        min_samples=min(neighbours + 1, count),
        allow_single_cluster=single,
        metric="precomputed",
        copy=True,
    )
    return np.asarray(fitted.fit_predict(distances), dtype=np.int64)


def _k_means(points: Numbers, count: int, seed: int) -> Any:
    return KMeans(count, n_init=10, random_state=seed).fit(points)


def seed_from(rng: Generator) -> int:
    """A seed for scikit-learn, drawn from our generator."""
    return int(torch.randint(2**31 - 1, (1,), generator=rng))


def k_means(points: Numbers, count: int, rng: Generator) -> Labels:
    """The cluster of each point [N, D]; at most as many clusters as there are different points."""
    count = min(count, len(np.unique(points, axis=0)))
    return np.asarray(_k_means(points, count, seed_from(rng)).labels_, dtype=np.int64)


def cluster_count(points: Numbers, most: int, rng: Generator, references: int = 10) -> int:
    """How many clusters k the points [N, D] form, by the gap statistic (Tibshirani, Walther & Hastie 2001).

    gap(k) = mean log W*(k) − log W(k), with W the summed squared distance to the nearest centre and W* that of uniform
    points in the same box; the smallest k with gap(k) ≥ gap(k + 1) − s(k + 1), where s is the spread of log W*.
    """
    different = len(np.unique(points, axis=0))
    if different < 3:
        return different
    spans = points.max(0) - points.min(0)
    scaled = (points - points.min(0)) / spans.max()
    draws = torch.rand(references, *points.shape, generator=rng, dtype=torch.float64).numpy() * spans / spans.max()
    seed = seed_from(rng)
    before = -math.inf
    for k in range(1, min(most, different - 1) + 2):
        within = math.log(max(_k_means(scaled, min(k, different), seed).inertia_, 1e-12))
        uniform = np.log([max(_k_means(draw, min(k, len(draw)), seed).inertia_, 1e-12) for draw in draws])
        gap = float(uniform.mean()) - within
        if before >= gap - float(uniform.std()) * math.sqrt(1 + 1 / references):
            return k - 1
        before = gap
    return min(most, different)


def mean_shift(points: Numbers) -> Labels:
    """Clusters of points by mean shift (Comaniciu & Meer 2002), the first the densest; bandwidth: half the points."""
    bandwidth = estimate_bandwidth(points, quantile=0.5) if len(points) > 1 else 0.0
    if bandwidth <= 0:  # too few points, or half of them the same: those that are the same are one cluster
        _, labels = np.unique(points.round(6), axis=0, return_inverse=True)
        return np.asarray(labels if len(points) > 3 else np.zeros(len(points)), dtype=np.int64).reshape(-1)
    return np.asarray(MeanShift(bandwidth=bandwidth, cluster_all=False).fit(points).labels_, dtype=np.int64)


def largest(labels: Labels) -> npt.NDArray[np.bool_]:
    """Who is in the cluster with most members; outliers (−1) are in none."""
    names, sizes = np.unique(labels[labels >= 0], return_counts=True)
    return np.asarray(labels == names[sizes.argmax()]) if len(names) else np.zeros(len(labels), dtype=bool)
