"""FLTrust (Cao et al., NDSS 2021): the server trains too, and trusts updates that point where its own does.

With the root update Δ_0, trained from the global model on the clean set: T_k = max(0, cos(Δ_k, Δ_0)) and Δ = Σ_k T_k
· (‖Δ_0‖/‖Δ_k‖) · Δ_k / Σ_k T_k. The root trains as a benign client does, so keep its settings near `client`'s. Kept
are the clients with T > 0; if there is none, nothing changes. Ignores weights. Memory: no copy, one training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from defenses.aggregation.geometry import among_finite
from defenses.aggregation.local_models import global_model
from fl_sim.errors import require
from fl_sim.protocols import Aggregate, ServerContext, State
from fl_sim.training import sgd


def trust(deltas: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Trust scores, and by how much each update is scaled to be as long as the root's."""
    scale = root.norm() / deltas.norm(dim=1).clamp(min=1e-12)
    cosines = (deltas @ root) * scale / root.norm().square().clamp(min=1e-24)
    return cosines.clamp(min=0), scale


@dataclass(frozen=True)
class FlTrust:
    """Weighs updates by their cosine with one trained on the clean set, and gives all its length."""

    needs_clean: ClassVar[bool] = True

    epochs: int = 2
    batch_size: int = 32
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    augment: bool = False

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", self.epochs, "must be 1 or more")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "must be 2 or more")
        require(self.lr > 0, "lr", self.lr, "must be above 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "must be from 0 to below 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        scores, scale = trust(deltas, self.root(ctx))
        shares = scores / scores.sum().clamp(min=1e-12)
        return Aggregate((shares * scale) @ deltas, scores > 0)

    def root(self, ctx: ServerContext) -> Tensor:
        """The server's own update."""
        assert ctx.clean is not None
        model = global_model(ctx)
        optimizer = sgd(model, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        samples = ctx.clean.then(ctx.augment) if self.augment else ctx.clean
        ctx.fit(model, samples, optimizer, epochs=self.epochs, batch_size=self.batch_size, rng=ctx.rng)
        return (ctx.layout.read(model) - ctx.vector)[: ctx.layout.parameters]
