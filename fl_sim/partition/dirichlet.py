"""Label skew by a Dirichlet distribution (Hsu, Qi & Brown 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl_sim.errors import require
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
        require(self.min_samples >= 0, "min_samples", self.min_samples, "must be 0 or more")

    def check(self, samples: int, clients: int) -> None:
        enough = self.min_samples * clients <= samples
        require(enough, "min_samples", self.min_samples, f"{clients} clients share only {samples} samples")

    def split(self, labels: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        owner = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(clients, self.alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for client, part in enumerate(np.split(members, cuts)):
                owner[part] = client
        _fill_up(owner, clients, self.min_samples, rng)
        order = np.argsort(owner, kind="stable")
        return np.split(order, np.cumsum(np.bincount(owner, minlength=clients))[:-1])


def _fill_up(owner: Indices, clients: int, least: int, rng: np.random.Generator) -> None:
    sizes = np.bincount(owner, minlength=clients)
    for client in np.flatnonzero(sizes < least):
        while sizes[client] < least:
            donor = int(sizes.argmax())
            moved = rng.choice(np.flatnonzero(owner == donor))
            owner[moved] = client
            sizes[donor] -= 1
            sizes[client] += 1
