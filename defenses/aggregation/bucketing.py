"""Bucketing (Karimireddy, He & Jaggi, ICLR 2022): mix clients at random before a robust rule, against non-IID data.

Clients are shuffled and averaged in buckets of s; the inner rule sees the buckets. s = 2, as in the paper. A client
is kept if its bucket is. A bucket is spoilt by one attacker, so as many buckets as attackers are supposed to be
malicious. The inner rule must not follow clients over rounds: a bucket goes by the id of its first member. Memory:
1/s of the stack, and what the inner rule needs for 1/s of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from defenses.aggregation.geometry import among_finite
from defenses.aggregation.krum import Krum
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, Aggregator, ServerContext, State


@dataclass(frozen=True)
class Bucketing:
    """Hands means of `size` random clients each to another rule."""

    size: int = 2
    rule: Aggregator = field(default_factory=Krum)

    def __post_init__(self) -> None:
        require(self.size >= 1, "size", self.size, "must be 1 or more clients")
        able = callable(getattr(self.rule, "aggregate", None))
        require(able, "rule", self.rule, "must be a section with the _target_ of an aggregation rule")

    @property
    def needs_clean(self) -> bool:
        """Whether the inner rule needs a clean set."""
        return bool(getattr(self.rule, "needs_clean", False))

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        order = torch.randperm(len(deltas), generator=ctx.rng)
        buckets = order.to(deltas.device).split(self.size)
        held = torch.stack([weights[bucket].sum() for bucket in buckets])
        means = deltas.new_empty(len(buckets), deltas.shape[1])
        for mean, bucket, weight in zip(means, buckets, held, strict=True):
            mean.copy_(weights[bucket] / weight @ deltas[bucket])
        inner = replace(
            ctx,
            clients=tuple(ctx.clients[first] for first in order[:: self.size].tolist()),
            assumed_attackers=min(ctx.assumed_attackers, len(buckets)),
        )
        result = self.rule.aggregate(means, held, state, inner)
        if result.kept is None:
            return result
        kept = torch.zeros(len(deltas), dtype=torch.bool, device=deltas.device)
        for bucket, keep in zip(buckets, result.kept, strict=True):
            kept[bucket] = keep
        return replace(result, kept=kept)
