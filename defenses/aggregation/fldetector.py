"""FLDetector (Zhang et al., KDD 2022): honest clients' updates can be foretold from their last ones.

ĝ_k^t = g_k^{t−1} + Ĥ (w_t − w_{t−1}), Ĥ by L-BFGS from the last N changes of the global model and of the aggregate;
d_k = ‖ĝ_k − g_k‖ / Σ_j ‖ĝ_j − g_j‖; a client's score is the mean of its last N d_k. If the gap statistic finds more
than one cluster of scores, 2-means splits them and the cluster of higher scores is rejected. N = 10, as in the paper.

Deviations: a client is rejected as long as its score is high, the paper removes it and trains again from the start;
the official code also waits 20 rounds. The rule is made for full participation: only who took part in the round
before is scored, and only clients with N scores are judged. Memory: the last stack is remembered in half precision,
whose rounding is far below an honest client's surprises, so with this round's it is one copy of the stack, and 2N
vectors; read in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.aggregation.centered_clipping import distances_to
from defenses.aggregation.clustering import cluster_count, k_means
from defenses.aggregation.geometry import among_finite, gram
from defenses.aggregation.mean import weighted_mean
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State


def hessian_product(steps: Tensor, changes: Tensor, direction: Tensor) -> Tensor:
    """Ĥ v by compact L-BFGS (Byrd, Nocedal & Schnabel 1994) from steps s_i and gradient changes y_i, each [N, P].

    Ĥ v = σ v − [σ Sᵀ Yᵀ] · [[σ S Sᵀ, L], [Lᵀ, −D]]⁻¹ · [σ S v; Y v], with σ = yᵀs/sᵀs of the last pair and
    S Yᵀ = L + D + upper.
    """
    count = len(steps)
    products = gram(torch.cat([steps, changes, direction[None]])).cpu().double()
    ss, sy = products[:count, :count], products[:count, count : 2 * count]
    scale = sy[-1, -1] / ss[-1, -1].clamp(min=1e-30)
    lower = sy.tril(-1)
    matrix = torch.cat([torch.cat([scale * ss, lower], 1), torch.cat([lower.T, -sy.diagonal().diag()], 1)])
    against = torch.cat([scale * products[:count, -1], products[count : 2 * count, -1]])
    solved = torch.linalg.pinv(matrix) @ against
    first, second = (part.to(direction) for part in (scale * solved[:count], solved[count:]))
    product: Tensor = scale.to(direction) * direction - first @ steps - second @ changes
    return product


def surprises(deltas: Tensor, last: Tensor, rows: list[tuple[int, int]], expected: Tensor) -> Tensor:
    """‖g_k − g_k^{t−1} − Ĥv‖ of the (row now, row then) pairs, as shares of their sum."""
    apart = torch.stack([distances_to(deltas[now, None], last[then] + expected)[0] for now, then in rows])
    return apart / apart.sum().clamp(min=1e-30)


@dataclass(frozen=True)
class FlDetector:
    """Rejects clients whose updates stay far from what their last update and the model's curvature foretell."""

    window: int = 10

    def __post_init__(self) -> None:
        require(self.window >= 1, "window", self.window, "must be 1 or more rounds")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        vector = ctx.vector[: deltas.shape[1]].clone()
        memory: dict[str, Tensor] = {
            name: value.to(deltas.device) for name, value in state.items() if isinstance(value, Tensor)
        }
        scores = {name: value for name, value in memory.items() if name.startswith("scores ")}
        if "steps" in memory:
            self._score(deltas, vector - memory["vector"], memory, scores, ctx)
        kept = self._judge(scores, ctx).to(deltas.device)
        aggregate = weighted_mean(deltas, weights, kept)
        kept_state = scores | {
            "updates": deltas.to(torch.bfloat16),
            "clients": torch.tensor(ctx.clients),
            "vector": vector,
            "aggregate": aggregate.clone(),
        }
        if "vector" in memory:
            for name, now in (("steps", vector - memory["vector"]), ("changes", aggregate - memory["aggregate"])):
                past = memory.get(name, now.new_zeros(0, len(now)))
                kept_state[name] = torch.cat([past, now[None]])[-self.window :]
        return Aggregate(aggregate, kept, kept_state)

    def _score(
        self, deltas: Tensor, step: Tensor, memory: dict[str, Tensor], scores: dict[str, Tensor], ctx: ServerContext
    ) -> None:
        """Append this round's normalised distances to the scores."""
        then = {client: row for row, client in enumerate(memory["clients"].tolist())}
        rows = [(row, then[client]) for row, client in enumerate(ctx.clients) if client in then]
        if len(rows) < 2:  # a share of a sum over one client says nothing
            return
        expected = hessian_product(memory["steps"], memory["changes"], step)
        for (row, _), share in zip(rows, surprises(deltas, memory["updates"], rows, expected).cpu(), strict=True):
            name = f"scores {ctx.clients[row]}"
            past = scores[name].cpu() if name in scores else share.new_zeros(0)
            # As much as an even share is 1, so that scores of rounds with more and with fewer clients compare.
            scores[name] = torch.cat([past, share[None] * len(rows)])[-self.window :]

    def _judge(self, scores: dict[str, Tensor], ctx: ServerContext) -> Tensor:
        """Whom to keep: all, unless the scores fall into clusters."""
        kept = torch.ones(len(ctx.clients), dtype=torch.bool)
        known = {
            row: past
            for row, c in enumerate(ctx.clients)
            if len(past := scores.get(f"scores {c}", kept[:0])) == self.window
        }
        if len(known) < 3:
            return kept
        means = torch.stack([past.double().mean().cpu() for past in known.values()])
        points = means[:, None].numpy()
        if cluster_count(points, 8, ctx.rng) > 1:
            labels = torch.from_numpy(k_means(points, 2, ctx.rng))
            high = int(means[labels == 1].mean() > means[labels == 0].mean())
            kept[torch.tensor(list(known))] = labels != high
        return kept
