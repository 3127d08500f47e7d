"""Any of Flower's own strategies (`flwr.serverapp.strategy`) as an aggregation rule.

The strategy's `aggregate_train` is given one reply for each client: its update as arrays, its weight as num-examples.
It gets updates where Flower sends models, around a global model of zeros, which changes no rule that does not depend
on where the origin is, and keeps more digits. Whom the strategy kept is read off the replies whose metrics it
averages. What it remembers is carried over as plain tensors. Its options are its constructor's; those about sampling
have no effect. The strategies with a server learning rate (FedAdam, ...) take their step here, before
`server_optimizer`'s. Memory: Flower's, on the host: some copies of the largest layer of all clients (FedMedian,
FedTrimmedAvg), of the whole stack one (FedAvg and the server optimisers) or more (Krum, MultiKrum, Bulyan).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from torch import Tensor

from defenses.aggregation.geometry import among_finite
from fl_sim.engines.records import TensorArray, by_reference
from fl_sim.errors import RunError, require
from fl_sim.layout import Layout
from fl_sim.protocols import Aggregate, ServerContext, State

REMEMBERED = ("m_t", "v_t", "momentum_vector")
"""What strategies keep from round to round: a dict or a list of arrays, one for each tensor of the model."""
UNFIT = {
    "FedProx": "aggregates as FedAvg does; its proximal term is the client's: client=fedprox",
    "QFedAvg": "needs each client's loss of the global model, which no client sends",
    "FedXgbBagging": "bags trees, not a network's parameters",
    "FedXgbCyclic": "passes trees on, not a network's parameters",
    "DifferentialPrivacyServerSideFixedClipping": "wraps another strategy's rounds; aggregator=weak_dp does it",
    "DifferentialPrivacyServerSideAdaptiveClipping": "wraps another strategy's rounds; aggregator=weak_dp comes near",
    "DifferentialPrivacyClientSideFixedClipping": "clips on clients; aggregator=weak_dp does on the server",
    "DifferentialPrivacyClientSideAdaptiveClipping": "clips on clients; aggregator=norm_clipping does on the server",
}
"""What Flower ships besides that can't work as an aggregation rule here, and why."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without Flower's line in the log for each aggregation; its warnings stay."""
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


@dataclass(frozen=True)
class Reply:
    """What a strategy reads of a client's message; a real one can be made only inside a Flower run."""

    content: RecordDict

    def has_error(self) -> bool:
        return False


def names() -> list[str]:
    """The strategies that can be used."""
    found = {name: getattr(flower, name) for name in dir(flower)}
    fits = [n for n, kind in found.items() if isinstance(kind, type) and issubclass(kind, flower.FedAvg)]
    return sorted(set(fits) - set(UNFIT))


def pieces(vector: Tensor, layout: Layout) -> dict[str, Tensor]:
    """A vector of parameters as the model's tensors, by name."""
    found, start = dict[str, Tensor](), 0
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        size = int(np.prod(shape, dtype=np.int64))
        if start + size > len(vector):
            break
        found[name] = vector[start : start + size].view(shape)
        start += size
    return found


def joined(arrays: list[Any]) -> Tensor:
    """Arrays as one vector."""
    return torch.from_numpy(np.concatenate([np.asarray(array, dtype=np.float32).reshape(-1) for array in arrays]))


@dataclass(frozen=True)
class FlowerStrategy:
    """Uses a strategy of Flower's by its class name, with the options of its constructor."""

    strategy: str = "FedMedian"
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        why = UNFIT.get(self.strategy)
        allowed = f"{f'it {why}; ' if why else ''}must be one of {', '.join(names())}"
        require(self.strategy in names(), "strategy", self.strategy, allowed)
        try:
            self._build(lambda *_: MetricRecord())
        except (TypeError, ValueError) as error:
            require(False, "options", dict(self.options or {}), f"{self.strategy} does not take them ({error})")

    def check_cohort(self, size: int) -> None:
        """Flower's Bulyan makes nothing of fewer replies than its guarantee needs."""
        if self.strategy == "Bulyan":
            least = 4 * int((self.options or {}).get("num_malicious_nodes", 0)) + 3
            allowed = f"Bulyan needs 4 · num_malicious_nodes + 3 = {least} clients in a round, here are {size}"
            require(size >= least, "options", dict(self.options or {}), allowed)

    @among_finite
    def aggregate(self, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        kept = torch.zeros(len(deltas), dtype=torch.bool)

        def record_kept(replies: list[RecordDict], _key: str) -> MetricRecord:
            kept[[int(float(str(reply.metric_records["metrics"]["row"]))) for reply in replies]] = True
            return MetricRecord()

        built = self._build(record_kept)
        self._recall(built, state, pieces(torch.zeros(deltas.shape[1]), ctx.layout))
        replies = [self._reply(row, delta, weights, ctx.layout) for row, delta in enumerate(deltas)]
        with quiet():
            arrays, _ = built.aggregate_train(ctx.round, replies)
        if arrays is None:
            raise RunError(f"round {ctx.round}: Flower's {self.strategy} made nothing of {len(deltas)} updates")
        step = joined(arrays.to_numpy_ndarrays()).to(deltas)
        return Aggregate(step, None if kept.all() else kept.to(deltas.device), self._remember(built))

    def _build(self, record_kept: Any) -> Any:
        return getattr(flower, self.strategy)(**(self.options or {}), train_metrics_aggr_fn=record_kept)

    def _reply(self, row: int, delta: Tensor, weights: Tensor, layout: Layout) -> Reply:
        arrays = by_reference({name: TensorArray(part) for name, part in pieces(delta, layout).items()})
        metrics = MetricRecord({"num-examples": float(weights[row]), "row": float(row)})
        return Reply(RecordDict({"arrays": arrays, "metrics": metrics}))

    def _recall(self, built: Any, state: State, zeros: dict[str, Tensor]) -> None:
        """Put back what was remembered; the global model is zero, see above."""
        if isinstance(built, flower.FedAvgM):
            built.current_arrays = ArrayRecord({name: Array(part.numpy()) for name, part in zeros.items()})
        elif isinstance(built, (flower.FedAdagrad, flower.FedAdam, flower.FedYogi)):
            built.current_arrays = {name: part.numpy() for name, part in zeros.items()}
        for name in REMEMBERED:
            if isinstance(value := state.get(name), Tensor):
                sizes = [part.numel() for part in zeros.values()]
                parts = [p.view(z.shape).numpy() for p, z in zip(value.cpu().split(sizes), zeros.values(), strict=True)]
                setattr(built, name, parts if name == "momentum_vector" else dict(zip(zeros, parts, strict=True)))

    def _remember(self, built: Any) -> State:
        held = {name: getattr(built, name, None) for name in REMEMBERED}
        return {n: joined(list(v.values() if isinstance(v, dict) else v)) for n, v in held.items() if v}
