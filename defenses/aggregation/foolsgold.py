"""FoolsGold (Fung, Yoon & Beschastnikh, RAID 2020): clients whose histories point the same way are sybils.

With v_i = max_j cos(H_i, H_j) over summed past updates H: cos_ij is scaled by v_i/v_j where v_i < v_j (pardoning),
α_i = 1 − max_j cos_ij is divided by the largest, α ← ln(α/(1 − α)) + ½ is clipped to [0, 1]; Δ = Σ w_k α_k Δ_k / Σ
w_k α_k.

Deviations: the weighted sum is normalised, so that the server's learning rate means the same as for other rules; the
history is that of the last layer by default, which holds the paper's indicative features, because whole updates of
all clients ever seen would have to be remembered (`layers: all`). Identical updates are sybils by definition: if all
are, nobody is kept and nothing changes. Kept are the clients with α > 0. Memory: no copy; with `layers: all` one of
the cohort's histories, and as much remembered for every client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from defenses.aggregation.geometry import among_finite, cosines_of, gram
from defenses.aggregation.local_models import head_columns
from defenses.aggregation.mean import shares_of
from fl_sim.protocols import Aggregate, ServerContext, State


def trust(cosines: Tensor) -> Tensor:
    """α in [0, 1] for each client from the cosines of their histories."""
    cosines = cosines.clone().fill_diagonal_(0)
    closest = cosines.max(1).values
    pardoned = closest[:, None] < closest
    ratio = closest[:, None] / closest.clamp(min=1e-30)
    alpha = 1 - torch.where(pardoned, cosines * ratio, cosines).max(1).values
    # Rounding leaves 1e-8 or so between the cosines of copies.
    alpha = torch.where(alpha < 1e-6, 0, alpha).clamp(0, 1)
    alpha = (alpha / alpha.max().clamp(min=1e-30)).clamp(max=0.99)
    return (alpha / (1 - alpha)).log().add(0.5).clamp(0, 1)


@dataclass(frozen=True)
class FoolsGold:
    """Gives clients less weight the more alike their summed updates are."""

    layers: Literal["head", "all"] = "head"

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        seen = torch.cat([deltas[:, part] for part in head_columns(ctx)], 1) if self.layers == "head" else deltas
        histories = dict(state)
        for client, update in zip(ctx.clients, seen, strict=True):
            past = state.get(f"history {client}")
            histories[f"history {client}"] = update + past.to(update) if isinstance(past, Tensor) else update.clone()
        stacked = [histories[f"history {client}"] for client in ctx.clients]
        alpha = trust(cosines_of(gram(torch.stack([each for each in stacked if isinstance(each, Tensor)]))))
        kept = alpha > 0
        shares = shares_of(weights * alpha.to(weights.dtype), kept)
        return Aggregate(shares @ deltas, kept, histories)
