"""A Little Is Enough (Baruch, Baruch & Goldberg, NeurIPS 2019): all attackers hide within the honest updates' spread.

Every attacker sends μ − z·σ, by coordinate, of the honest updates. Of n clients with m attackers s = ⌊n/2⌋ + 1 − m
honest ones must lie farther out for a majority; z is the standard normal's quantile at (n − m − s)/(n − m), at least 0.
`purpose: backdoor` is the paper's other use: the mean of the attackers' own updates, clipped to μ ± z·σ. Deviation: its
attackers estimate μ and σ from their own honest updates; ours see the honest ones, and their own where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from torch import Tensor

from clients.collusion.perturbation import observed, replaced, spread
from fl_sim.errors import require
from fl_sim.protocols import ServerContext


def hidden(clients: int, attackers: int) -> float:
    """The paper's z; where attackers are a majority already, as if one honest client had to be won."""
    honest = clients - attackers
    if honest < 1:
        return 0.0
    supporters = max(clients // 2 + 1 - attackers, 1)
    share = (honest - supporters) / honest
    return max(NormalDist().inv_cdf(share), 0.0) if share > 0 else 0.0


@dataclass(frozen=True)
class Alie:
    """All attackers send the honest mean, shifted by `z` standard deviations, or a backdoor clipped to within that."""

    z: float | Literal["auto"] = "auto"
    purpose: Literal["prevent", "backdoor"] = "prevent"

    def __post_init__(self) -> None:
        require(self.z == "auto" or self.z >= 0, "z", self.z, "must be auto or a number not below 0")

    def tamper(self, deltas: Tensor, malicious: Tensor, ctx: ServerContext) -> Tensor:
        rows = observed(deltas, malicious)
        z = hidden(len(deltas), int(malicious.sum())) if self.z == "auto" else self.z
        mean, reach = rows.mean(0), z * spread(rows)
        if self.purpose == "prevent":
            return replaced(deltas, malicious, mean - reach)
        return replaced(deltas, malicious, deltas[malicious].mean(0).clamp(mean - reach, mean + reach))
