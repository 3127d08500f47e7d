"""Server optimisers: how an aggregate becomes a step of the global parameters (Reddi et al., ICLR 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_sim.errors import require
from fl_sim.protocols import State


def remembered(state: State, name: str, like: Tensor) -> Tensor:
    """A tensor of an earlier round, or zeros in the first."""
    value = state.get(name)
    return value.to(like.device) if isinstance(value, Tensor) else torch.zeros_like(like)


@dataclass(frozen=True)
class Plain:
    """w ← w + η·Δ; with η = 1 federated averaging."""

    lr: float = 1.0

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", self.lr, "must be above 0")

    @property
    def rate(self) -> float | None:
        return self.lr

    def step(self, delta: Tensor, state: State) -> tuple[Tensor, State]:
        return self.lr * delta, {}


@dataclass(frozen=True)
class Momentum:
    """FedAvgM (Hsu, Qi & Brown 2019): v ← βv + Δ, w ← w + η·v."""

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", self.lr, "must be above 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "must be from 0 to below 1")

    @property
    def rate(self) -> float | None:
        return self.lr

    def step(self, delta: Tensor, state: State) -> tuple[Tensor, State]:
        velocity = self.momentum * remembered(state, "velocity", delta) + delta
        return self.lr * velocity, {"velocity": velocity}


@dataclass(frozen=True)
class Adam:
    """FedAdam: m ← β₁m + (1−β₁)Δ, v ← β₂v + (1−β₂)Δ², w ← w + η·m/(√v + τ); no bias correction."""

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 0.001

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", self.lr, "must be above 0")
        require(0 <= self.beta1 < 1, "beta1", self.beta1, "must be from 0 to below 1")
        require(0 <= self.beta2 < 1, "beta2", self.beta2, "must be from 0 to below 1")
        require(self.tau > 0, "tau", self.tau, "must be above 0")

    @property
    def rate(self) -> float | None:
        return None

    def step(self, delta: Tensor, state: State) -> tuple[Tensor, State]:
        first = self.beta1 * remembered(state, "first", delta) + (1 - self.beta1) * delta
        second = self.beta2 * remembered(state, "second", delta) + (1 - self.beta2) * delta.square()
        return self.lr * first / (second.sqrt() + self.tau), {"first": first, "second": second}
