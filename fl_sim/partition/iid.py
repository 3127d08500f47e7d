"""Every client gets a random, equally large share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl_sim.protocols import Indices


@dataclass(frozen=True)
class Iid:
    """Shuffled samples in equal shares; sizes differ by one at most."""

    def split(self, labels: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), clients)]
