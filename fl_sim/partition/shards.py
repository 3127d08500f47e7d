"""Label skew by shards (McMahan et al., AISTATS 2017): samples sorted by label, cut into equal shards, dealt out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl_sim.errors import require
from fl_sim.partition.owners import check_enough, check_least, fill_up, owners, shares_of
from fl_sim.protocols import Indices


@dataclass(frozen=True)
class Shards:
    """Each client gets `shards_per_client` random pieces of the samples sorted by label, so it sees few classes.

    Sizes are equal but for rounding; clients that end with fewer than `min_samples` take random samples from the
    largest ones.
    """

    shards_per_client: int = 2
    min_samples: int = 2

    def __post_init__(self) -> None:
        require(self.shards_per_client >= 1, "shards_per_client", self.shards_per_client, "must be 1 or more")
        check_least(self.min_samples)

    def check(self, samples: int, clients: int) -> None:
        check_enough(self.min_samples, samples, clients)
        most = max(samples // clients, 1)
        allowed = f"{clients} clients share only {samples} samples: must be from 1 to {most}"
        require(self.shards_per_client <= most, "shards_per_client", self.shards_per_client, allowed)

    def split(self, labels: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        shuffled = rng.permutation(len(labels))
        by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
        shards = np.array_split(by_label, clients * self.shards_per_client)
        hands = rng.permutation(len(shards)).reshape(clients, self.shards_per_client)
        owner = owners([np.concatenate([shards[shard] for shard in hand]) for hand in hands], len(labels))
        fill_up(owner, clients, self.min_samples, rng)
        return shares_of(owner, clients)
