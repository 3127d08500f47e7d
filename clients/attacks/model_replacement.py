"""Model replacement (Bagdasaryan et al., AISTATS 2020): data poisoning whose update is scaled up to outweigh others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from clients.attacks.data_poisoning import DataPoisoning
from fl_sim.errors import ConfigError, require
from fl_sim.layout import Layout
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import ClientContext, Threatening, Update
from fl_sim.samples import Samples


def boosted(delta: Tensor, factor: float, layout: Layout) -> Tensor:
    """The parameters' part of an update times `factor`; buffers as they are, for boosted statistics are nonsense."""
    scaled = delta.clone()
    scaled[: layout.parameters] *= factor
    return scaled


def replacing_factor(threatening: Threatening) -> float:
    """1 / (η · the attackers' summed weight): with it the average becomes the attackers' own model."""
    assert threatening.server_rate is not None
    return 1 / (threatening.server_rate * threatening.weight)


@dataclass(frozen=True)
class ModelReplacement(DataPoisoning):
    """Scales its update by `boost`; `auto` replaces the global model outright."""

    boost: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        usable = self.boost == "auto" or (0 < self.boost < float("inf"))
        require(usable, "boost", self.boost, "must be auto or a number above 0")

    def check_server(self, rate: float | None) -> None:
        if self.boost == "auto" and not rate:
            raise ConfigError("boost", "auto", "this server optimizer has no fixed learning rate: give a number")

    def update(self, model: Classifier, samples: Samples, ctx: ClientContext) -> Update:
        assert ctx.threatening is not None
        update = super().update(model, samples, ctx)
        factor = replacing_factor(ctx.threatening) if self.boost == "auto" else self.boost
        return replace(update, delta=boosted(update.delta, factor, ctx.layout))
