"""Inner product manipulation (Xie, Koyejo & Gupta, UAI 2020): an update against the honest ones' mean.

Δ = −ε · μ̂, with μ̂ the attacker's own estimate of the benign mean: with enough attackers the aggregate's inner product
with the true mean turns negative. The paper's attackers see all honest updates; ours know what a client knows: `own`
takes the update that it would send if honest; `progress` takes the way that the global model has gone since the
attackers last attacked, at the length of its own honest update (the first time, its own update). Small ε hides, large ε
breaks.
Parameters only; batch statistics are honest. There is no backdoor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from clients.attacks.hooked import honest_update
from clients.attacks.model_replacement import boosted
from fl_sim.errors import require
from fl_sim.layout import Layout
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import Client, ClientContext, Update
from fl_sim.samples import Samples


def along(delta: Tensor, direction: Tensor, layout: Layout) -> Tensor:
    """A fresh update of the same length with the parameters' part turned into `direction`; buffers as they are."""
    turned, split = delta.clone(), layout.parameters
    way = direction[:split]
    turned[:split] = way * (delta[:split].norm() / way.norm().clamp(min=1e-12))
    return turned


@dataclass(frozen=True)
class Ipm:
    """Sends −`epsilon` times its estimate of the honest clients' mean update."""

    client: Client
    epsilon: float = 0.5
    estimate: Literal["own", "progress"] = "own"

    def __post_init__(self) -> None:
        require(self.epsilon > 0, "epsilon", self.epsilon, "must be above 0")

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        assert ctx.threatening is not None
        update, previous = honest_update(self.client, model, samples, ctx), ctx.threatening.previous
        delta = update.delta
        if self.estimate == "progress" and previous is not None:
            delta = along(delta, ctx.received - previous, ctx.layout)
        return replace(update, delta=boosted(delta, -self.epsilon, ctx.layout))
