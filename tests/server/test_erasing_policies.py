"""When the server erases."""

from __future__ import annotations

import pytest

from fl_sim.errors import ConfigError
from server.erasing import AtEnd, Every, Never, Policy


@pytest.mark.parametrize(
    ("policy", "due"),
    [
        (Never(), []),
        (AtEnd(), [10]),
        (Every(rounds=3), [3, 6, 9]),
        (Every(rounds=5), [5, 10]),
        (Every(rounds=1), list(range(1, 11))),
        (Every(rounds=11), []),
    ],
)
def test_rounds_of_ten_in_which_an_erasing_is_due(policy: Every, due: list[int]) -> None:
    assert [t for t in range(1, 11) if policy.due(t, 10)] == due


@pytest.mark.parametrize("make", [Never, AtEnd, Every])
def test_floors_are_fractions(make: type[Policy]) -> None:
    assert make(floor=1.0).floor == 1.0
    for floor in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="floor"):
            make(floor=floor)


def test_every_needs_a_period() -> None:
    with pytest.raises(ConfigError, match="rounds=0"):
        Every(rounds=0)
