"""Quantity skew (Li, Diao, Chen & He, "Federated learning on non-IID data silos", ICDE 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl_sim.errors import require
from fl_sim.partition.owners import check_enough, check_least, fill_up, owners, shares_of
from fl_sim.protocols import Indices


@dataclass(frozen=True)
class Quantity:
    """Clients' sizes are shares drawn from Dir(alpha), small alpha for few large clients; labels are mixed evenly.

    Clients that end with fewer than `min_samples` take random samples from the largest ones.
    """

    alpha: float = 0.5
    min_samples: int = 2

    def __post_init__(self) -> None:
        require(0 < self.alpha <= 1e6, "alpha", self.alpha, "must be a number above 0 and at most 1000000")
        check_least(self.min_samples)

    def check(self, samples: int, clients: int) -> None:
        check_enough(self.min_samples, samples, clients)

    def split(self, labels: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        shares = rng.dirichlet(np.full(clients, self.alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(labels)).astype(np.int64)
        owner = owners(np.split(rng.permutation(len(labels)), cuts), len(labels))
        fill_up(owner, clients, self.min_samples, rng)
        return shares_of(owner, clients)
