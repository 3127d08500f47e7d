"""Who is malicious and when."""

from __future__ import annotations

import pytest
from toys import seeded

from clients.threats import Always, Every, SingleShot, Window
from fl_sim.errors import ConfigError


@pytest.mark.parametrize(
    ("fraction", "clients", "count"),
    [(0.0, 20, 0), (0.2, 20, 4), (0.2, 7, 1), (0.3, 10, 3), (1.0, 5, 5), (0.01, 1000, 10), (0.01, 20, 0)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_exactly_the_rounded_share_is_malicious(fraction: float, clients: int, count: int, seed: int) -> None:
    """0.2 · 7 = 1.4 -> 1; 0.01 · 20 = 0.2 -> 0."""
    malicious = Always(fraction).malicious(clients, seeded(seed))
    assert len(malicious) == count
    assert malicious <= frozenset(range(clients))


def test_who_is_drawn_depends_on_the_generator_only() -> None:
    draws = [Always(0.2).malicious(50, seeded(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert Window(0.2).malicious(50, seeded(0)) == SingleShot(0.2).malicious(50, seeded(0)) == draws[0]


def test_every_client_may_be_drawn() -> None:
    """200 draws of 2 of 10: a given client is missing from all with probability 0.8^200 = 4e-20."""
    assert frozenset().union(*(Always(0.2).malicious(10, seeded(s)) for s in range(200))) == frozenset(range(10))


@pytest.mark.parametrize(
    ("threat", "active"),
    [
        (Always(), list(range(1, 13))),
        (Window(first=3, last=5), [3, 4, 5]),
        (Window(first=4, last=4), [4]),
        (SingleShot(at=5), [5]),
        (SingleShot(at=99), []),
        (Every(rounds=4, first=2), [2, 6, 10]),
        (Every(rounds=1, first=9), [9, 10, 11, 12]),
    ],
)
def test_active_rounds_of_twelve(threat: Always, active: list[int]) -> None:
    assert [t for t in range(1, 13) if threat.active(t)] == active


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Always(1.1), "fraction"),
        (lambda: Always(-0.1), "fraction"),
        (lambda: Window(2.0), "fraction"),
        (lambda: Window(first=0), "first"),
        (lambda: Window(first=5, last=4), "last"),
        (lambda: SingleShot(at=0), "at"),
        (lambda: Every(rounds=0), "rounds"),
        (lambda: Every(first=0), "first"),
    ],
)
def test_impossible_threats_are_refused(make: type[Always], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.key == key
