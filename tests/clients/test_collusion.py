"""Collusion: what omniscient attackers make of a round's updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import seeded, server_context, small_model

from clients.collusion.alie import Alie, hidden
from clients.collusion.min_max import MinMax, min_max
from clients.collusion.min_sum import MinSum, min_sum
from clients.collusion.perturbation import Perturbation, perturbation
from fl_sim.errors import ConfigError

KINDS: list[Perturbation] = ["std", "sign", "unit"]
CTX = server_context(small_model())


def rows(count: int, size: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=seeded(seed)) + 0.5


@pytest.mark.parametrize("collusion", [Alie(), Alie(z=1.5), Alie(z=0.5, purpose="backdoor"), MinMax(), MinSum()])
def test_attackers_send_one_vector_and_honest_rows_stay(collusion: Any) -> None:
    """A fresh tensor; the input is bit-identical afterwards; the honest rows are, too."""
    deltas, malicious = rows(6), torch.tensor([True, False, False, True, False, False])
    before = deltas.clone()
    out = collusion.tamper(deltas, malicious, CTX)
    assert out.data_ptr() != deltas.data_ptr()
    assert torch.equal(deltas, before)
    assert torch.equal(out[~malicious], deltas[~malicious])
    assert torch.equal(out[0], out[3])
    assert not torch.equal(out[0], deltas[0])
    assert not torch.equal(out[0], deltas[3])


@pytest.mark.parametrize(("purpose", "expected"), [("prevent", [0.5, -1.5]), ("backdoor", [3.5, -1.5])])
def test_alie_by_hand(purpose: Any, expected: list[float]) -> None:
    """Honest rows (1, 1) and (3, −1): μ = (2, 0), σ = (1, 1).

    Preventing: μ − 1.5σ = (0.5, −1.5). The attackers' own mean (9, −9) is clipped to (3.5, −1.5).
    """
    deltas = torch.tensor([[1.0, 1.0], [3.0, -1.0], [10.0, -10.0], [8.0, -8.0]])
    out = Alie(z=1.5, purpose=purpose).tamper(deltas, torch.tensor([False, False, True, True]), CTX)
    assert out[2].tolist() == expected


@pytest.mark.parametrize(
    ("clients", "attackers", "z"), [(50, 24, 1.4261), (50, 12, 0.3360), (10, 3, 0.1800), (10, 2, 0.0), (10, 1, 0.0)]
)
def test_alies_quantile(clients: int, attackers: int, z: float) -> None:
    """s = ⌊n/2⌋ + 1 − m of the n − m honest: Φ⁻¹(24/26) with s = 2, Φ⁻¹(24/38) with s = 14, Φ⁻¹(4/7) with s = 3.

    Two of ten: s = 4 of 8, Φ⁻¹(1/2) = 0. One of ten: s = 5 of 9, Φ⁻¹(4/9) would be negative.
    """
    assert hidden(clients, attackers) == pytest.approx(z, abs=1e-4)


def test_alies_quantile_stays_finite_in_a_majority() -> None:
    """6 of 10: s would be 0, one is taken, Φ⁻¹(3/4). 9 or all of 10: no one or none honest, z = 0."""
    assert hidden(10, 6) == pytest.approx(0.6745, abs=1e-4)
    assert hidden(10, 9) == 0.0
    assert hidden(10, 10) == 0.0
    with pytest.raises(ConfigError, match="z"):
        Alie(z=-1.0)


def test_perturbations_by_hand() -> None:
    """Rows (0, 2) and (6, −10): μ = (3, −4), σ = (3, 6)."""
    two = torch.tensor([[0.0, 2.0], [6.0, -10.0]])
    assert perturbation(two, "std").tolist() == [-3.0, -6.0]
    assert perturbation(two, "sign").tolist() == [-1.0, 1.0]
    torch.testing.assert_close(perturbation(two, "unit"), torch.tensor([-0.6, 0.8]))


def bisected(honest: Tensor, way: Tensor, *, summed: bool) -> Tensor:
    """The papers' search, naively: the largest γ that keeps the constraint, to 1e-6."""

    def fits(gamma: float) -> bool:
        sent = honest.mean(0) + gamma * way
        pairs = torch.stack([torch.stack([(a - b).square().sum() for b in honest]) for a in honest])
        own = torch.stack([(sent - a).square().sum() for a in honest])
        return bool(own.sum() <= pairs.sum(1).max()) if summed else bool(own.max() <= pairs.max())

    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return honest.mean(0) + low * way


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_roots_are_what_bisection_finds(kind: Perturbation, seed: int) -> None:
    """In double precision, on rows of uneven spread."""
    honest = rows(5, seed=seed).double() * torch.tensor([1.0, 5.0, 0.2, 1.0, 3.0, 1.0, 0.5])
    way = perturbation(honest, kind)
    torch.testing.assert_close(min_max(honest, way), bisected(honest, way, summed=False), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(min_sum(honest, way), bisected(honest, way, summed=True), rtol=1e-6, atol=1e-6)


def test_min_max_by_hand() -> None:
    """Rows 0 and 4 on a line: μ = 2, widest 4. Along −1 the farther row is 4: 2 − γ is 4 away from it at γ = 2.

    Min-sum: the outermost row's sum is 16; (2 − γ)² + (2 + γ)² = 8 + 2γ² = 16 at γ = 2, too.
    """
    honest, way = torch.tensor([[0.0], [4.0]]), torch.tensor([-1.0])
    assert min_max(honest, way).tolist() == [0.0]
    assert min_sum(honest, way).tolist() == [0.0]


@pytest.mark.parametrize("attack", [Alie(z=1.0), MinMax(), MinSum(), MinMax("sign"), MinSum("unit")])
def test_degenerate_rounds(attack: Any) -> None:
    """One honest row has no spread: attackers send it as it is. Without honest rows their own serve; all is finite."""
    deltas = rows(3)
    out = attack.tamper(deltas, torch.tensor([True, False, True]), CTX)
    torch.testing.assert_close(out[0], deltas[1])
    every = attack.tamper(deltas, torch.ones(3, dtype=torch.bool), CTX)
    assert bool(every.isfinite().all())
    assert torch.equal(every[0], every[2])
    assert not torch.equal(every[0], deltas.mean(0))
    same = attack.tamper(torch.ones(4, 5), torch.tensor([True, False, False, False]), CTX)
    assert bool(same.isfinite().all())
