"""Intervals, paired tests and corrections, against scipy, against enumeration, and by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from fl_sim.report.curves import band
from fl_sim.report.statistics import DRAWN, EXACT, Estimate, estimate, holm, paired, sign_flips

SOME = [0.31, 0.12, 0.55, 0.02, 0.4]


def test_an_interval_is_students() -> None:
    """(1, 2, 3): mean 2, standard error 1/√3, t of 2 degrees at 97.5 % is 4.302653."""
    found = estimate([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_what_is_not_known_does_not_count() -> None:
    assert estimate([None, 0.5, None]) == Estimate(0.5, None, 1)
    assert estimate([None]) is None
    assert estimate([]) is None


@pytest.mark.parametrize("values", [SOME, [-0.2, 0.1], [0.5, 0.51, 0.49, 0.5]])
def test_the_paired_t_test_is_scipys(values: list[float]) -> None:
    """An independent implementation of the same test."""
    found = paired(values)
    assert found is not None
    assert found.t_p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-10)


@pytest.mark.parametrize("values", [SOME, [-0.2, 0.1, 0.3, 0.0], [0.1, 0.1, -0.1]])
def test_sign_flips_are_counted_all(values: list[float]) -> None:
    """Against the definition: the share of all 2^n choices of signs whose sum is as far from zero."""
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    expected = sum(each >= abs(sum(values)) - 1e-12 for each in sums) / len(sums)
    assert sign_flips(values) == expected


def test_sign_flips_of_many_pairs_are_drawn() -> None:
    """Twenty differences of one sign: 2/2^20 if all were counted, so that hardly a draw is as far; never zero."""
    p = sign_flips([0.1] * (EXACT + 6))
    assert 0 < p <= 5 / DRAWN
    balanced = sign_flips([0.1, -0.1] * 10)
    assert balanced == 1.0


def test_equal_differences_leave_the_t_test_undefined() -> None:
    """Five times -1 has no spread: t would be infinite and p zero from five seeds. Sign flips say 2/2^5."""
    found = paired([-1.0] * 5)
    assert found is not None
    assert found.t_p is None
    assert found.flip_p == found.p == 2 / 32
    rounding = paired([0.1 + 0.2, 0.3, 0.3])
    assert rounding is not None
    assert rounding.t_p is None


def test_one_pair_tests_nothing() -> None:
    found = paired([0.5])
    assert found is not None
    assert found.p is None
    assert paired([]) is None


def test_holm_by_hand() -> None:
    """(0.01, 0.04, 0.03, 0.005): sorted times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04; never below one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_band_is_the_estimate_at_each_point() -> None:
    """Curves of unequal length: at each point only those that are there count."""
    rows = [[0.1, 0.2, None], [0.3, 0.6, 0.5], [0.2, None, None]]
    found = band([1, 2, 3], rows)
    for index in range(3):
        expected = estimate(row[index] for row in rows)
        assert expected is not None
        assert found.mean[index] == pytest.approx(expected.mean, abs=1e-4)
        assert found.half[index] == (None if expected.half is None else pytest.approx(expected.half, abs=1e-4))
    assert list(found.n) == [3, 2, 1]
    assert band([1], [[None]]).mean == [None]


def test_no_claim_from_noise() -> None:
    """Of a thousand comparisons without a difference about one in twenty has p below 0.05: the test keeps its level."""
    rng = np.random.default_rng(0)
    found = [paired(list(rng.normal(size=5))) for _ in range(1000)]
    share = sum(each is not None and each.p is not None and each.p < 0.05 for each in found) / 1000
    assert 0.03 < share < 0.07
