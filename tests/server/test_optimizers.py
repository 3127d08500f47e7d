"""Server optimisers over two steps, against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import seeded

from fl_sim.errors import ConfigError
from fl_sim.protocols import ServerOptimizer, State
from server.optimizers import Adam, Momentum, Plain

FIRST, SECOND = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 0.5, 1.0])


def two_steps(optimizer: ServerOptimizer) -> list[Tensor]:
    steps: list[Tensor] = []
    state: State = {}
    for delta in (FIRST, SECOND):
        step, state = optimizer.step(delta, state)
        steps.append(step)
    return steps


def test_plain_of_rate_one_is_the_identity() -> None:
    delta = torch.randn(100, generator=seeded())
    step, state = Plain(1.0).step(delta, {})
    assert torch.equal(step, delta)
    assert state == {}
    assert torch.equal(Momentum(1.0, 0.0).step(delta, {})[0], delta)


def test_plain_scales() -> None:
    """Half of (1, −2, 0) and of (0.5, 0.5, 1)."""
    assert [step.tolist() for step in two_steps(Plain(0.5))] == [[0.5, -1.0, 0.0], [0.25, 0.25, 0.5]]


def test_momentum_by_hand() -> None:
    """v₁ = Δ₁ = (1, −2, 0); v₂ = ½v₁ + Δ₂ = (1, −0.5, 1); steps 2v."""
    assert [step.tolist() for step in two_steps(Momentum(2.0, 0.5))] == [[2.0, -4.0, 0.0], [2.0, -1.0, 2.0]]


def test_adam_by_hand() -> None:
    """β₁ = 0.5, β₂ = 0.75, τ = 0.1, η = 1, first coordinate (Δ = 1, then 0.5), no bias correction:
    m₁ = 0.5, v₁ = 0.25, step 0.5/(0.5 + 0.1); m₂ = 0.25 + 0.25 = 0.5, v₂ = 0.1875 + 0.0625 = 0.25: the same step.
    Third coordinate (0, then 1): 0/(0 + 0.1) = 0; m₂ = 0.5, v₂ = 0.25: 0.5/0.6."""
    first, second = two_steps(Adam(1.0, 0.5, 0.75, 0.1))
    assert float(first[0]) == pytest.approx(0.5 / 0.6)
    assert float(second[0]) == pytest.approx(0.5 / 0.6)
    assert float(first[2]) == 0.0
    assert float(second[2]) == pytest.approx(0.5 / 0.6)
    assert float(first[1]) == pytest.approx(-1 / 1.1)  # m = −1, v = 1


@pytest.mark.parametrize("optimizer", [Plain(), Momentum(), Adam()])
def test_steps_do_not_alias_or_change_what_they_are_given(optimizer: ServerOptimizer) -> None:
    delta = FIRST.clone()
    step, state = optimizer.step(delta, {})
    kept = {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
    assert len(kept) == len(state)
    again, _ = optimizer.step(SECOND.clone(), state)
    step.fill_(9.0)
    again.fill_(9.0)
    assert torch.equal(delta, FIRST)
    assert all(torch.equal(state[name], value) for name, value in kept.items())  # type: ignore[arg-type]


def test_rates_are_known_where_the_step_is_proportional() -> None:
    assert (Plain(0.5).rate, Momentum(0.7).rate, Adam(0.1).rate) == (0.5, 0.7, None)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Plain(0.0), "lr"),
        (lambda: Momentum(-1.0), "lr"),
        (lambda: Momentum(momentum=1.0), "momentum"),
        (lambda: Adam(0.0), "lr"),
        (lambda: Adam(beta1=1.0), "beta1"),
        (lambda: Adam(beta2=-0.1), "beta2"),
        (lambda: Adam(tau=0.0), "tau"),
    ],
)
def test_impossible_settings_are_refused(make: type[Plain], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.key == key
