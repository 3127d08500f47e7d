"""What partitions share: from the owner of each sample to the clients' shares, none of them too small."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fl_sim.errors import require
from fl_sim.protocols import Indices


def check_least(least: int) -> None:
    require(least >= 0, "min_samples", least, "must be 0 or more")


def check_enough(least: int, samples: int, clients: int) -> None:
    require(least * clients <= samples, "min_samples", least, f"{clients} clients share only {samples} samples")


def fill_up(owner: Indices, clients: int, least: int, rng: np.random.Generator) -> None:
    """Give clients with fewer than `least` samples random ones of the largest clients, in place."""
    sizes = np.bincount(owner, minlength=clients)
    for client in np.flatnonzero(sizes < least):
        while sizes[client] < least:
            donor = int(sizes.argmax())
            moved = rng.choice(np.flatnonzero(owner == donor))
            owner[moved] = client
            sizes[donor] -= 1
            sizes[client] += 1


def shares_of(owner: Indices, clients: int) -> list[Indices]:
    """The sorted indices that each client owns."""
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=clients))[:-1])


def owners(parts: Sequence[Indices], samples: int) -> Indices:
    """The owner of each sample, of parts in the order of their clients."""
    owner = np.empty(samples, dtype=np.int64)
    for client, part in enumerate(parts):
        owner[part] = client
    return owner
