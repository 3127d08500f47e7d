"""Label skew by a Dirichlet distribution (Hsu, Qi & Brown 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl_sim.errors import require
from fl_sim.partition.owners import check_enough, check_least, fill_up, shares_of
from fl_sim.protocols import Indices


@dataclass(frozen=True)
class Dirichlet:
    """Each class is spread over the clients by shares drawn from Dir(alpha): small alpha, few classes a client.

    Clients that end with fewer than `min_samples` take random samples from the largest ones.
    """

    alpha: float = 1.0
    min_samples: int = 2

    def __post_init__(self) -> None:
        require(0 < self.alpha <= 1e6, "alpha", self.alpha, "must be a number above 0 and at most 1000000")
        check_least(self.min_samples)

    def check(self, samples: int, clients: int) -> None:
        check_enough(self.min_samples, samples, clients)

    def split(self, labels: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        owner = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(clients, self.alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for client, part in enumerate(np.split(members, cuts)):
                owner[part] = client
        fill_up(owner, clients, self.min_samples, rng)
        return shares_of(owner, clients)
