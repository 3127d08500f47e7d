"""Cohort sampling: who takes part in a round, and with what weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator

from fl_sim.errors import require


@dataclass(frozen=True)
class Uniform:
    """`clients_per_round` clients drawn without replacement; weighted equally, or by their numbers of samples."""

    weighting: Literal["equal", "samples"] = "equal"

    def cohort(self, clients: int, size: int, malicious: frozenset[int], rng: Generator) -> list[int]:
        return sorted(torch.randperm(clients, generator=rng)[:size].tolist())

    def weights(self, samples: Sequence[int]) -> list[float]:
        if self.weighting == "equal":
            return [1 / len(samples)] * len(samples)
        return [count / sum(samples) for count in samples]


@dataclass(frozen=True)
class FixedMalicious(Uniform):
    """As uniform, but exactly `malicious_per_round` of each cohort are malicious: less noise between seeds."""

    malicious_per_round: int = 2

    def __post_init__(self) -> None:
        least = self.malicious_per_round >= 0
        require(least, "malicious_per_round", self.malicious_per_round, "must be 0 or more")

    def check_cohort(self, size: int, malicious: int, clients: int) -> None:
        asked = self.malicious_per_round
        most = min(size, malicious)
        require(
            asked <= most, "malicious_per_round", asked, f"only {most} can be in a cohort: must be from 0 to {most}"
        )
        honest = clients - malicious
        few = f"only {honest} honest clients for {size - asked} places"
        require(size - asked <= honest, "malicious_per_round", asked, few)

    def cohort(self, clients: int, size: int, malicious: frozenset[int], rng: Generator) -> list[int]:
        order = torch.randperm(clients, generator=rng).tolist()
        bad = [client for client in order if client in malicious][: self.malicious_per_round]
        good = [client for client in order if client not in malicious][: size - len(bad)]
        return sorted(bad + good)


@dataclass(frozen=True)
class Poisson(Uniform):
    """Every client takes part independently with probability `clients_per_round` / `clients`.

    Cohorts vary in size, as privacy accounting supposes. An empty one, of probability (1 − p)^clients, is drawn again:
    the round would change nothing.
    """

    def cohort(self, clients: int, size: int, malicious: frozenset[int], rng: Generator) -> list[int]:
        while True:
            takes_part = torch.rand(clients, generator=rng, dtype=torch.float64) < size / clients
            if takes_part.any():
                return takes_part.nonzero().flatten().tolist()
