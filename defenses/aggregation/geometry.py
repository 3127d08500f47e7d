"""What rules share: which updates are sound, passes over columns that bound the memory, inner products, distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

from fl_sim.acceptance import LONGEST
from fl_sim.protocols import Aggregate, ServerContext, State

ENTRIES = 1 << 22
"""How many entries of the stack a pass looks at together: what it makes of them is all the memory that it needs."""
CACHED = 1 << 19
"""As many as stay in a core's cache in double precision: products of them take half the time."""

Rule = TypeVar("Rule")
Method: TypeAlias = Callable[[Rule, Tensor, Tensor, State, ServerContext], Aggregate]


def column_parts(deltas: Tensor) -> Iterator[Tensor]:
    """The stack as views of some columns each."""
    yield from deltas.split(max(ENTRIES // len(deltas), 1), dim=1)


def ascending(part: Tensor) -> Tensor:
    """Each column's values in order. On a CPU by NumPy: of 100, with AVX-512, in a fifteenth of PyTorch's time."""
    if part.device.type != "cpu" or part.dtype not in (torch.float32, torch.float64):
        return part.sort(0).values
    return torch.from_numpy(np.sort(part.detach().numpy(), axis=0))


def finite_rows(deltas: Tensor) -> Tensor:
    """Which updates can be reckoned with: no NaN, no infinity, no length whose square is beyond single precision."""
    squares = torch.zeros(len(deltas), dtype=torch.float32, device=deltas.device)
    for part in column_parts(deltas):
        squares += torch.linalg.vector_norm(part, dim=1).float().square()
    return squares < LONGEST**2


def among_finite(aggregate: Method[Rule]) -> Method[Rule]:
    """The rule as if clients with NaN, infinity or an absurd length had sent nothing; they count as rejected.

    They are taken for attackers, so fewer of the rest are supposed to be. If nobody is left, nothing changes. A round
    with such an update costs a copy of the others.
    """

    @wraps(aggregate)
    def guarded(rule: Rule, deltas: Tensor, weights: Tensor, state: State, ctx: ServerContext) -> Aggregate:
        finite = finite_rows(deltas)
        rows = finite.nonzero().squeeze(1).tolist()
        broken = len(deltas) - len(rows)
        if not broken:
            return aggregate(rule, deltas, weights, state, ctx)
        if not rows:
            return Aggregate(deltas.new_zeros(deltas.shape[1]), finite, state)
        rest = replace(
            ctx,
            clients=tuple(ctx.clients[row] for row in rows),
            assumed_attackers=max(ctx.assumed_attackers - broken, 0),
        )
        result = aggregate(rule, deltas[finite], weights[finite] / weights[finite].sum(), state, rest)
        if result.kept is not None:
            finite[rows] = result.kept
        return replace(result, kept=finite)

    return guarded


def precise(device: torch.device) -> torch.dtype:
    """Sums over millions of columns need more digits than their terms; Apple's GPUs have no more."""
    return torch.float32 if device.type == "mps" else torch.float64


def gram(deltas: Tensor) -> Tensor:
    """All inner products ⟨Δ_i, Δ_j⟩, summed in double precision."""
    dtype = precise(deltas.device)
    products = deltas.new_zeros(len(deltas), len(deltas), dtype=dtype)
    width = max((ENTRIES if deltas.device.type != "cpu" else CACHED) // len(deltas), 1)
    buffer = deltas.new_empty(len(deltas), min(width, deltas.shape[1]), dtype=dtype)
    for part in deltas.split(width, dim=1):
        wide = buffer[:, : part.shape[1]].copy_(part)
        products += wide @ wide.T
    return products


def distances_of(products: Tensor) -> Tensor:
    """‖Δ_i − Δ_j‖² from the inner products; to a row with NaN or infinity it is infinite."""
    squares = products.diagonal()
    apart: Tensor = (squares[:, None] + squares - 2 * products).clamp(min=0).nan_to_num(nan=float("inf"))
    return apart.fill_diagonal_(0)


def cosines_of(products: Tensor) -> Tensor:
    """cos(Δ_i, Δ_j) from the inner products; a zero row is at right angles to all others."""
    lengths = products.diagonal().clamp(min=0).sqrt().clamp(min=1e-30)
    cosines: Tensor = (products / lengths[:, None] / lengths).clamp(-1, 1)
    return cosines.fill_diagonal_(1)


def squared_distances(deltas: Tensor) -> Tensor:
    """Pairwise ‖Δ_i − Δ_j‖²; double precision keeps those of near-equal updates."""
    return distances_of(gram(deltas)).to(deltas.dtype)


def some_columns(columns: int, count: int, rng: Generator) -> Tensor:
    """About `count` columns at random: drawn with replacement, because a permutation of millions is slow."""
    if count >= columns:
        return torch.arange(columns)
    drawn: Tensor = torch.randint(columns, (count,), generator=rng).unique()
    return drawn
