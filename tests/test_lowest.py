"""Lower bounds that can be had: Flower, which is held to one minor release, asks for some of the same packages."""

from __future__ import annotations

from importlib.metadata import requires

import pytest
from lowest import ASKED, lowest
from packaging.requirements import Requirement

FLOWER = {each.name.lower(): each for each in map(Requirement, requires("flwr") or ()) if each.marker is None}


def test_flower_shares_some_of_our_packages() -> None:
    """So that the test below looks at something."""
    assert {"numpy", "pyyaml", "rich"} <= FLOWER.keys()


@pytest.mark.parametrize("requirement", ASKED)
def test_the_oldest_release_that_is_claimed_is_one_that_flower_takes(requirement: str) -> None:
    """Each dependency and each extra has a lower bound, too; `make test-lowest` installs and tries all of them."""
    name, version = lowest(requirement).split("==")
    if name in FLOWER:
        assert FLOWER[name].specifier.contains(version), FLOWER[name]
