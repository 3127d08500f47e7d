"""Bulyan (El Mhamdi, Guerraoui & Rouault, ICML 2018): Krum again and again, then a mean around the median.

θ = n − 2f updates are picked one by one, each by Krum among those not yet picked; of each coordinate the θ − 2f
picked values closest to their median are averaged. The paper's guarantee needs n ≥ 4f + 3; with fewer clients the
rule runs on, with at least one update picked and one value averaged. Memory: chunks of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.aggregation.geometry import among_finite, ascending, column_parts, squared_distances
from defenses.aggregation.krum import check_attackers, neighbour_scores
from fl_sim.protocols import Aggregate, ServerContext, State


def pick(distances: Tensor, count: int, attackers: int) -> list[int]:
    """The rows that Krum picks one after the other."""
    left, picked = list(range(len(distances))), list[int]()
    while len(picked) < count:
        best = int(neighbour_scores(distances[left][:, left], attackers).argmin())
        picked.append(left.pop(best))
    return picked


def around_median(deltas: Tensor, rows: list[int], count: int) -> Tensor:
    """The mean of the `count` values of each column that are closest to the rows' median.

    In order of size they stand side by side: of all such windows it is the one whose farther end is nearest.
    """
    means = []
    for part in column_parts(deltas):
        values = ascending(part[rows])
        middle = (values[(len(rows) - 1) // 2] + values[len(rows) // 2]) / 2
        farthest = torch.maximum(middle - values[: len(rows) - count + 1], values[count - 1 :] - middle)
        window = farthest.argmin(0) + torch.arange(count, device=values.device)[:, None]
        means.append(values.gather(0, window).mean(0))
    return torch.cat(means)


@dataclass(frozen=True)
class Bulyan:
    """Picks n − 2f updates by Krum and averages each coordinate's values around their median. Ignores weights.

    `attackers` is f, by default the number the server assumes.
    """

    attackers: int | None = None

    def __post_init__(self) -> None:
        check_attackers(self.attackers)

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        attackers = ctx.assumed_attackers if self.attackers is None else self.attackers
        theta = max(len(deltas) - 2 * attackers, 1)
        picked = pick(squared_distances(deltas).cpu(), theta, attackers)
        kept = torch.zeros(len(deltas), dtype=torch.bool, device=deltas.device)
        kept[picked] = True
        return Aggregate(around_median(deltas, sorted(picked), max(theta - 2 * attackers, 1)), kept)
