"""What colluders know of a round's updates, and along which way they leave the honest mean."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Perturbation: TypeAlias = Literal["std", "sign", "unit"]


def observed(deltas: Tensor, malicious: Tensor) -> Tensor:
    """The honest updates of the round; the attackers' own where there is no honest one."""
    honest = deltas[~malicious]
    return honest if len(honest) else deltas


def spread(rows: Tensor) -> Tensor:
    """The standard deviation of each coordinate; of a single row, zero."""
    return rows.std(0, correction=0)


def perturbation(rows: Tensor, kind: Perturbation) -> Tensor:
    """∇^p: the inverse standard deviation −σ, the inverse sign −sign(μ), or the inverse unit vector −μ/‖μ‖."""
    if kind == "std":
        return -spread(rows)
    mean = rows.mean(0)
    return -mean.sign() if kind == "sign" else -mean / mean.norm().clamp(min=1e-12)


def farthest(squared: Tensor, inner: Tensor, length: Tensor, bound: Tensor) -> Tensor:
    """The largest γ ≥ 0 with a_i + 2γ·b_i + γ²·c ≤ B for all i; the papers find it by bisection.

    a_i = ‖μ − ∇_i‖² never exceeds B, so each quadratic has one root that is not negative. Without a way to go (c = 0)
    γ is zero.
    """
    root = (inner.square() + length * (bound - squared).clamp(min=0)).sqrt() - inner
    return torch.where(length > 0, root / length.clamp(min=torch.finfo(length.dtype).tiny), 0).min()


def replaced(deltas: Tensor, malicious: Tensor, sent: Tensor) -> Tensor:
    """A fresh copy in which every attacker sends the same vector."""
    out = deltas.clone()
    out[malicious] = sent
    return out
