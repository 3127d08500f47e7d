"""Robust rules, against loops and numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toys import seeded, server_context, small_model

from defenses.aggregation.geometry import squared_distances
from defenses.aggregation.krum import Krum, MultiKrum, keep_best, krum_scores
from defenses.aggregation.mean import Mean
from defenses.aggregation.median import Median
from defenses.aggregation.norm_clipping import NormClipping, clipping_factors
from defenses.aggregation.trimmed_mean import TrimmedMean, middle_mean
from fl_sim.errors import ConfigError
from fl_sim.protocols import Aggregate, Aggregator

RULES: list[Aggregator] = [
    Mean(),
    Median(),
    TrimmedMean(0.2),
    Krum(),
    MultiKrum(),
    NormClipping(1.0),
    NormClipping(None),
]
IDS = ["mean", "median", "trimmed_mean", "krum", "multi_krum", "norm_clipping", "norm_clipping_median"]


def aggregate(rule: Aggregator, deltas: Tensor, weights: Tensor | None = None, attackers: int = 1) -> Aggregate:
    given = torch.full((len(deltas),), 1 / len(deltas)) if weights is None else weights
    ctx = server_context(small_model(), clients=len(deltas), assumed_attackers=attackers)
    return rule.aggregate(deltas, given, {}, ctx)


def draws(rows: int = 7, columns: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=seeded(seed))


def shares(rows: int = 7) -> Tensor:
    weights = torch.rand(rows, generator=seeded(9)) + 0.1
    return weights / weights.sum()


# By hand --------------------------------------------------------------------------------------------------------------


def test_mean_by_hand() -> None:
    """¼·(4, 0) + ¾·(0, 8) = (1, 6)."""
    result = aggregate(Mean(), torch.tensor([[4.0, 0.0], [0.0, 8.0]]), torch.tensor([0.25, 0.75]))
    assert result.delta.tolist() == [1.0, 6.0]
    assert result.kept is None


def test_median_by_hand() -> None:
    """Of 1, 9, 2: 2. Of 1, 9, 2, 4: the middle two are 2 and 4, whose mean is 3. Weights play no part."""
    odd = torch.tensor([[1.0], [9.0], [2.0]])
    even = torch.tensor([[1.0], [9.0], [2.0], [4.0]])
    assert aggregate(Median(), odd, torch.tensor([0.98, 0.01, 0.01])).delta.tolist() == [2.0]
    assert aggregate(Median(), even).delta.tolist() == [3.0]


def test_trimmed_mean_by_hand() -> None:
    """Five values, trim 0.2: one off each end. (100, 1, 2, 3, −50): (1 + 2 + 3)/3 = 2; trim 0.4: the median, 2."""
    column = torch.tensor([[100.0], [1.0], [2.0], [4.0], [-50.0]])
    assert aggregate(TrimmedMean(0.2), column).delta.tolist() == pytest.approx([7 / 3])
    assert aggregate(TrimmedMean(0.4), column).delta.tolist() == [2.0]


def test_krum_by_hand() -> None:
    """Points 0, 1, 2, 10 on a line with f = 1: n − f − 2 = 1 neighbour. Scores 1, 1, 1, 64: of equals the first.

    Five points 0, 1, 2.5, 3, 50 with f = 1: 2 neighbours. Squares: 0: 1 + 6.25; 1: 1 + 2.25; 2.5: 0.25 + 2.25;
    3: 0.25 + 4; 50: 2209 + 2256.25. The lowest, 2.5, belongs to the third."""
    four, five = torch.tensor([[0.0], [1.0], [2.0], [10.0]]), torch.tensor([[0.0], [1.0], [2.5], [3.0], [50.0]])
    torch.testing.assert_close(krum_scores(four, 1), torch.tensor([1.0, 1.0, 1.0, 64.0]))
    torch.testing.assert_close(krum_scores(five, 1), torch.tensor([7.25, 3.25, 2.5, 4.25, 4465.25]))
    result = aggregate(Krum(), five)
    assert result.delta.tolist() == [2.5]
    assert result.kept is not None
    assert result.kept.tolist() == [False, False, True, False, False]
    assert aggregate(Krum(), four).delta.tolist() == [0.0]


def test_multi_krum_by_hand() -> None:
    """The same five points: n − f = 4 are kept, all but 50: weights 0.1, 0.2, 0.3, 0.2 of 0.8 give
    (0 + 0.2 + 0.75 + 0.6)/0.8 = 1.9375. Keeping 2: 2.5 and 1, (0.2·1 + 0.3·2.5)/0.5 = 1.9."""
    five, weights = torch.tensor([[0.0], [1.0], [2.5], [3.0], [50.0]]), torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2])
    result = aggregate(MultiKrum(), five, weights)
    assert result.kept is not None
    assert result.kept.tolist() == [True, True, True, True, False]
    assert result.delta.tolist() == pytest.approx([1.9375])
    two = aggregate(MultiKrum(keep=2), five, weights)
    assert two.kept is not None
    assert two.kept.tolist() == [False, True, True, False, False]
    assert two.delta.tolist() == pytest.approx([1.9])


def test_norm_clipping_by_hand() -> None:
    """(3, 4) has length 5 and is cut to 2: (1.2, 1.6); (0, 1) stays. Equal weights: (0.6, 1.3)."""
    deltas = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    result = aggregate(NormClipping(2.0), deltas)
    assert result.delta.tolist() == pytest.approx([0.6, 1.3])
    assert result.kept is None
    assert clipping_factors(torch.tensor([5.0, 1.0, 0.0]), 2.0).tolist() == pytest.approx([0.4, 1.0, 1.0])


def test_norm_clipping_to_the_rounds_median() -> None:
    """Lengths 1, 2, 9: cut to 2. (1 + 2 + 2)/3. Lengths 1 and 3: to 2, (1 + 2)/2."""
    three, two = torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([[1.0], [3.0]])
    assert aggregate(NormClipping(None), three).delta.tolist() == pytest.approx([5 / 3])
    assert aggregate(NormClipping(None), two).delta.tolist() == pytest.approx([1.5])


# Against naive loops --------------------------------------------------------------------------------------------------


def test_mean_is_the_naive_one() -> None:
    deltas, weights = draws(), shares()
    expected = torch.zeros(50)
    for delta, weight in zip(deltas, weights, strict=True):
        expected += weight * delta
    torch.testing.assert_close(aggregate(Mean(), deltas, weights).delta, expected)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 11])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.34, 0.49])
def test_trimmed_mean_is_the_naive_one(rows: int, share: float) -> None:
    """Each coordinate sorted as a list, without its ⌊share · n⌋ first and last."""
    deltas = draws(rows)
    trim = math.floor(share * rows)
    expected = [sum(sorted(column)[trim : rows - trim]) / (rows - 2 * trim) for column in deltas.T.tolist()]
    torch.testing.assert_close(aggregate(TrimmedMean(share), deltas).delta, torch.tensor(expected))


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_median_is_the_naive_one(rows: int) -> None:
    deltas = draws(rows)
    expected = deltas.double().quantile(0.5, dim=0).float()
    torch.testing.assert_close(aggregate(Median(), deltas).delta, expected)


def test_chunks_of_columns_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = middle_mean(draws(), 1)
    monkeypatch.setattr("defenses.aggregation.geometry.ENTRIES", 49)
    torch.testing.assert_close(middle_mean(draws(), 1), whole)


def naive_scores(deltas: Tensor, attackers: int) -> list[float]:
    count = len(deltas)
    neighbours = min(max(count - attackers - 2, 1), count - 1)
    scores = []
    for i in range(count):
        distances = sorted(float((deltas[i] - deltas[j]).double().square().sum()) for j in range(count) if j != i)
        scores.append(sum(distances[:neighbours]))
    return scores


@pytest.mark.parametrize("rows", [2, 3, 7, 10])
@pytest.mark.parametrize("attackers", [0, 1, 3, 20])
def test_krum_scores_are_the_naive_ones(rows: int, attackers: int) -> None:
    deltas = draws(rows)
    expected = naive_scores(deltas, attackers)
    torch.testing.assert_close(krum_scores(deltas, attackers), torch.tensor(expected))
    result = aggregate(Krum(), deltas, attackers=attackers)
    assert torch.equal(result.delta, deltas[expected.index(min(expected))])


def test_distances_of_nearly_equal_updates_are_not_lost() -> None:
    """Rows of length 1000 that differ by 0.001 in one place: the square is 1e-6, far below 1000²·2⁻²⁴ = 0.06."""
    deltas = torch.full((2, 100), 100.0)
    deltas[1, 0] += 2**-10
    assert float(squared_distances(deltas)[0, 1]) == pytest.approx(2**-20, rel=1e-4)


def test_norm_clipping_is_the_naive_one() -> None:
    deltas, weights = draws() * torch.linspace(0.1, 3, 7)[:, None], shares()
    expected = torch.zeros(50)
    for delta, weight in zip(deltas, weights, strict=True):
        expected += weight * delta * min(1.0, 5.0 / float(delta.norm()))
    torch.testing.assert_close(aggregate(NormClipping(5.0), deltas, weights).delta, expected)


# Limit cases ----------------------------------------------------------------------------------------------------------


def test_no_trimming_is_the_mean() -> None:
    torch.testing.assert_close(aggregate(TrimmedMean(0.0), draws()).delta, aggregate(Mean(), draws()).delta)


@pytest.mark.parametrize("rule", [MultiKrum(keep=7), MultiKrum(keep=99), MultiKrum(attackers=0)])
def test_krum_keeping_all_is_the_mean(rule: MultiKrum) -> None:
    result = aggregate(rule, draws(), shares())
    assert result.kept is not None
    assert result.kept.all()
    assert torch.equal(result.delta, aggregate(Mean(), draws(), shares()).delta)


def test_multi_krum_keeping_one_is_krum() -> None:
    one, krum = aggregate(MultiKrum(keep=1), draws(), shares()), aggregate(Krum(), draws(), shares())
    assert torch.equal(one.delta, krum.delta)
    assert one.kept is not None
    assert krum.kept is not None
    assert torch.equal(one.kept, krum.kept)


def test_clipping_at_a_length_that_none_has_is_the_mean() -> None:
    torch.testing.assert_close(
        aggregate(NormClipping(1e9), draws(), shares()).delta, aggregate(Mean(), draws(), shares()).delta
    )


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_one_client_alone_decides(rule: Aggregator) -> None:
    """Its update has length below 1, so that clipping leaves it."""
    delta = draws(1) / 100
    torch.testing.assert_close(aggregate(rule, delta).delta, delta[0])


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_identical_updates_are_their_own_aggregate(rule: Aggregator) -> None:
    delta = draws(1) / 100
    torch.testing.assert_close(aggregate(rule, delta.repeat(6, 1), shares(6)).delta, delta[0])


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_zero_updates_give_zero(rule: Aggregator) -> None:
    assert aggregate(rule, torch.zeros(5, 3)).delta.tolist() == [0.0] * 3


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_deltas_and_weights_are_left_unchanged_to_the_bit(rule: Aggregator) -> None:
    deltas, weights = draws(), shares()
    result = aggregate(rule, deltas, weights)
    result.delta.fill_(9.0)
    assert torch.equal(deltas, draws())
    assert torch.equal(weights, shares())


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_rules_take_a_view_of_wider_rows(rule: Aggregator) -> None:
    """The round loop hands over the parameters' columns of longer vectors."""
    wide = draws(columns=80)
    torch.testing.assert_close(aggregate(rule, wide[:, :50]).delta, aggregate(rule, wide[:, :50].clone()).delta)


@pytest.mark.parametrize("rule", RULES[1:5], ids=IDS[1:5])
@pytest.mark.parametrize("bad", [1e6, float("nan"), float("inf")])
def test_robust_rules_hold_against_one_outlier(rule: Aggregator, bad: float) -> None:
    """Six updates near 1 and one of nothing but huge, missing or infinite numbers: the result is near 1."""
    deltas = 1 + 0.01 * draws()
    deltas[3] = bad
    result = aggregate(rule, deltas)
    assert (result.delta - 1).abs().max() < 0.05
    if result.kept is not None:
        assert not result.kept[3]


def test_krum_ignores_the_weights_of_what_it_drops() -> None:
    deltas = 1 + 0.01 * draws()
    deltas[3] = 1e6
    weights = torch.full((7,), 0.01)
    weights[3] = 0.94
    assert (aggregate(MultiKrum(), deltas, weights).delta - 1).abs().max() < 0.05


def test_of_equal_scores_the_first_are_kept() -> None:
    assert keep_best(torch.tensor([1.0, 0.0, 1.0, 1.0]), 3).tolist() == [True, True, True, False]


def test_own_attackers_override_the_servers_assumption() -> None:
    deltas = draws()
    own = aggregate(MultiKrum(attackers=3), deltas, attackers=0)
    assert own.kept is not None
    assert int(own.kept.sum()) == 4
    assert torch.equal(own.delta, aggregate(MultiKrum(), deltas, attackers=3).delta)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: TrimmedMean(0.5), "trim"),
        (lambda: TrimmedMean(-0.1), "trim"),
        (lambda: Krum(-1), "attackers"),
        (lambda: MultiKrum(-1), "attackers"),
        (lambda: MultiKrum(keep=0), "keep"),
        (lambda: NormClipping(0.0), "max_norm"),
    ],
)
def test_impossible_settings_are_refused(make: type[TrimmedMean], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.key == key
