"""Every rule has a setting, or kind of updates, in which it is nothing but the mean; and what is left of Flower's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.serverapp import strategy as flwr_strategies
from test_aggregation_all import NAMES, PARAMETERS, context, draws, even, rule_of, sound
from torch import Tensor

from defenses.aggregation import flower
from defenses.aggregation.fltrust import FlTrust
from defenses.aggregation.krum import MultiKrum
from defenses.aggregation.mean import Mean
from defenses.aggregation.signguard import SignGuard
from fl_sim.build import build
from fl_sim.composing import compose_config
from fl_sim.errors import ConfigError
from fl_sim.protocols import Aggregator

WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.05, 0.1, 0.1])


def bundle() -> Tensor:
    """Seven updates of length ½ with the same signs, nearly parallel: no rule has anything against them."""
    spread = 1 + 0.1 * torch.rand(7, PARAMETERS, generator=torch.Generator().manual_seed(4))
    return torch.nn.functional.normalize(draws(1) * spread) / 2


def copies_of_the_root() -> Tensor:
    rule = rule_of("fltrust")
    assert isinstance(rule, FlTrust)
    return rule.root(context(7)).repeat(7, 1)


LIMITS: dict[str, tuple[dict[str, Any], Callable[[], Tensor], bool]] = {
    "mean": ({}, draws, True),
    "median": ({}, lambda: draws(2), False),  # the middle of two
    "trimmed_mean": ({"trim": 0.0}, draws, False),
    "krum": ({}, lambda: draws(1), False),
    "multi_krum": ({"keep": 7}, draws, True),
    "bulyan": ({"attackers": 0}, draws, False),
    "geometric_median": ({"iterations": 0}, draws, True),
    "norm_clipping": ({"max_norm": 1e6}, draws, True),
    "weak_dp": ({"max_norm": 1e6, "noise": 0.0}, draws, True),
    "crfl": ({"base": 1e6, "noise": 0.0}, draws, True),
    "foolsgold": ({"layers": "all"}, lambda: torch.randn(7, PARAMETERS, generator=torch.Generator()), True),
    "fltrust": ({}, copies_of_the_root, False),
    "flame": ({"noise": 0.0}, lambda: bundle()[:2], True),  # of more, HDBSCAN may call some outliers
    "deepsight": ({}, bundle, True),
    "rlr": ({"threshold": 0.0}, draws, True),
    "fldetector": ({"window": 10}, draws, True),  # of which none has passed
    "signguard": ({"share": 1.0}, bundle, True),
    "dnc": ({"attackers": 0}, draws, True),
    "centered_clipping": ({"radius": 1e6}, draws, True),
    "bucketing": ({"size": 7}, draws, True),  # one bucket, whatever the rule
    "rflbat": ({"first": 1e6, "second": 1e6, "clusters": 1}, draws, True),
    "flare": ({"temperature": 1e9}, draws, False),
    "indicator": ({"lr": 1e-12}, bundle, True),  # which plants nothing
    "flower": ({"strategy": "FedAvg"}, draws, True),
}
"""What to change, of which updates, and whether the mean is by weights."""


def test_every_rule_has_a_limit() -> None:
    assert sorted(LIMITS) == NAMES


@pytest.mark.parametrize("name", LIMITS)
def test_in_its_limit_a_rule_is_the_mean(name: str) -> None:
    """And keeps everyone, if it says whom it keeps."""
    changes, updates, weighted = LIMITS[name]
    deltas = updates()
    weights = WEIGHTS[: len(deltas)] / WEIGHTS[: len(deltas)].sum() if weighted else even(len(deltas))
    result = rule_of(name, **changes).aggregate(deltas, weights, {}, context(len(deltas)))
    expected = Mean().aggregate(deltas, weights, {}, context(len(deltas)))
    torch.testing.assert_close(result.delta, expected.delta, atol=1e-6, rtol=1e-4)
    assert result.kept is None or result.kept.all()


def test_signguard_clips_to_the_median_length() -> None:
    """Lengths 1, 2, 3 of one direction: all usual, all alike, cut to 1, 2, 2: of mean 5/3."""
    unit = torch.nn.functional.normalize(draws(1))
    deltas = unit * torch.tensor([[1.0], [2.0], [3.0]])
    result = SignGuard(share=1.0).aggregate(deltas, even(3), {}, context(3))
    torch.testing.assert_close(result.delta, 5 / 3 * unit[0])


def test_the_indicator_clips_the_kept_to_their_median_length() -> None:
    """As above; nothing is planted, and in the first round nobody is rejected."""
    unit = torch.nn.functional.normalize(draws(1))
    deltas = unit * torch.tensor([[1.0], [2.0], [3.0]])
    result = rule_of("indicator", lr=1e-12).aggregate(deltas, even(3), {}, context(3))
    torch.testing.assert_close(result.delta, 5 / 3 * unit[0], atol=1e-6, rtol=1e-4)


# Flower's strategies --------------------------------------------------------------------------------------------------


def shipped() -> list[str]:
    """All that Flower's package names."""
    return sorted(set(flwr_strategies.__all__) - {"Result", "Strategy"})


def test_all_that_flower_ships_is_either_used_or_refused_for_a_reason() -> None:
    assert sorted([*flower.names(), *flower.UNFIT]) == shipped()


@pytest.mark.parametrize(
    ("strategy", "clients"),
    [
        pytest.param(strategy, clients, marks=[pytest.mark.slow] if (strategy, clients > 2) == ("Bulyan", True) else [])
        for strategy in flower.names()
        for clients in (1, 2, 3, 7)
    ],
)
def test_each_of_flowers_strategies_makes_a_step(strategy: str, clients: int) -> None:
    """From one client on, but for Bulyan, which needs three at least. Of copies of one update those that take no
    step of their own make that update."""
    if strategy == "Bulyan" and clients < 3:
        with pytest.raises(ConfigError, match=f"Bulyan needs .* 3 clients in a round, here are {clients}"):
            flower.FlowerStrategy(strategy).check_cohort(clients)
        return
    rule: Aggregator = flower.FlowerStrategy(strategy)
    sound(rule.aggregate(draws(clients), even(clients), {}, context(clients)), clients)
    if strategy not in ("FedAdagrad", "FedAdam", "FedYogi"):
        delta = draws(1)
        same = rule.aggregate(delta.repeat(clients, 1), even(clients), {}, context(clients))
        torch.testing.assert_close(same.delta, delta[0])


@pytest.mark.parametrize("strategy", flower.UNFIT)
def test_what_cannot_be_used_is_refused_with_its_reason(strategy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(compose_config(["aggregator=flower", f"aggregator.strategy={strategy}"]))
    assert caught.value.key == "aggregator.strategy"
    assert flower.UNFIT[strategy] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flowers_bulyan_is_refused_before_a_run_that_is_too_small() -> None:
    """Ten clients a round: f = 2 would need 11."""
    words = ["aggregator=flower", "aggregator.strategy=Bulyan"]
    build(compose_config([*words, "aggregator.options={num_malicious_nodes: 1}"]))
    with pytest.raises(ConfigError, match="= 11 clients in a round, here are 10") as caught:
        build(compose_config([*words, "aggregator.options={num_malicious_nodes: 2}"]))
    assert caught.value.key == "aggregator.options"


def test_ours_and_flowers_multi_krum_select_alike() -> None:
    """n − f of them, as ours does by default, once Flower's is told to."""
    deltas = draws()
    deltas[3] *= 10
    theirs = flower.FlowerStrategy("MultiKrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 6})
    found, expected = (rule.aggregate(deltas, WEIGHTS, {}, context(7)) for rule in (theirs, MultiKrum()))
    assert found.kept is not None
    assert expected.kept is not None
    assert found.kept.tolist() == expected.kept.tolist() == [True] * 3 + [False] + [True] * 3
