"""Means with intervals, and paired tests over seeds; small samples, so nothing is taken for granted.

Student, "The probable error of a mean", Biometrika 1908; Holm, "A simple sequentially rejective multiple test
procedure", Scandinavian Journal of Statistics 1979; Fisher, "The Design of Experiments", 1935 (sign flips).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

LEVEL = 0.05
EXACT = 14
"""Up to so many pairs all sign flips are counted; beyond, this many of them are drawn:"""
DRAWN = 20_000


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half its 95 % interval (Student's t); a single value has no interval."""

    mean: float
    half: float | None
    n: int


@cache
def quantile(n: int) -> float:
    """Student's t for 95 % and n values."""
    from scipy.special import stdtrit  # imported late: most commands do without it

    return float(stdtrit(n - 1, 1 - LEVEL / 2))


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """The mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = statistics.fmean(known)
    if len(known) < 2:
        return Estimate(mean, None, 1)
    return Estimate(mean, quantile(len(known)) * statistics.stdev(known) / math.sqrt(len(known)), len(known))


@dataclass(frozen=True)
class Paired:
    """Differences between two defenses, seed by seed."""

    difference: Estimate
    t_p: float | None
    """The paired t test's two-sided p; None for a single pair, and for equal differences, which have no spread."""
    flip_p: float | None
    """The sign-flip permutation test's two-sided p; never below 2/2^n."""

    @property
    def p(self) -> float | None:
        """What counts: the t test where it is defined, else the sign flips."""
        return self.flip_p if self.t_p is None else self.t_p


def paired(differences: Sequence[float]) -> Paired | None:
    """Both tests of a mean difference of zero; None without a pair."""
    difference = estimate(differences)
    if difference is None:
        return None
    if difference.n < 2:
        return Paired(difference, None, None)
    deviation = statistics.stdev(differences)
    t_p = None
    # A spread of rounding errors only is none.
    if deviation > 1e-12 * max(1.0, max(map(abs, differences))):
        from scipy.special import stdtr

        t = difference.mean / (deviation / math.sqrt(difference.n))
        t_p = float(2 * stdtr(difference.n - 1, -abs(t)))
    return Paired(difference, t_p, sign_flips(differences))


def sign_flips(differences: Sequence[float]) -> float:
    """How often the mean is as far from zero as it is, if each difference's sign were a coin's."""
    values = np.asarray(differences)
    n = len(values)
    if n <= EXACT:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        extra = 0
    else:
        signs = 1 - 2 * np.random.default_rng(0).integers(0, 2, (DRAWN, n))
        extra = 1  # what was observed is one of the draws, so that p is never zero (Phipson & Smyth 2010)
    sums = np.abs(signs @ values)
    # Sums of the same numbers in another order differ in their last bits.
    as_far = int((sums >= abs(values.sum()) - 1e-12 * np.abs(values).sum()).sum())
    return (as_far + extra) / (len(signs) + extra)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values: the i-th smallest of m times m - i + 1, none below one before it, none above 1."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted = [0.0] * len(ps)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted
