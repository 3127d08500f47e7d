"""Cohorts and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from toys import seeded

from fl_sim.errors import ConfigError
from server.samplers import FixedMalicious, Poisson, Uniform

BAD = frozenset({1, 4, 9, 16})
SAMPLERS = [Uniform(), FixedMalicious(malicious_per_round=2)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("size", [2, 5, 18])
def test_cohorts_have_their_size_no_repeats_and_are_sorted(sampler: Uniform, size: int) -> None:
    for seed in range(20):
        cohort = sampler.cohort(20, size, BAD, seeded(seed))
        assert len(set(cohort)) == len(cohort) == size
        assert cohort == sorted(cohort)
        assert set(cohort) <= set(range(20))


@pytest.mark.parametrize("sampler", [*SAMPLERS, Poisson()])
def test_cohorts_depend_on_the_generator_only(sampler: Uniform) -> None:
    draws = [sampler.cohort(20, 6, BAD, seeded(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_everybody_can_take_part() -> None:
    assert Uniform().cohort(7, 7, frozenset(), seeded()) == list(range(7))


def test_uniform_does_not_look_at_who_is_malicious() -> None:
    assert Uniform().cohort(20, 6, BAD, seeded()) == Uniform().cohort(20, 6, frozenset(), seeded())


def test_uniform_is_uniform() -> None:
    """1000 cohorts of 5 of 20: each client is in 250 ± 4·√(1000·¼·¾) = 250 ± 55 of them."""
    counts = [0] * 20
    for seed in range(1000):
        for client in Uniform().cohort(20, 5, BAD, seeded(seed)):
            counts[client] += 1
    assert all(195 <= count <= 305 for count in counts)


@pytest.mark.parametrize("asked", [0, 1, 3, 4])
def test_fixed_malicious_has_exactly_so_many(asked: int) -> None:
    members: set[int] = set()
    for seed in range(50):
        cohort = FixedMalicious(malicious_per_round=asked).cohort(20, 6, BAD, seeded(seed))
        assert len(BAD & set(cohort)) == asked
        members |= set(cohort)
    assert members >= frozenset(range(20)) - BAD
    assert (members >= BAD) == (asked > 0)  # each of them has its turn


def test_weights_by_samples_or_equal() -> None:
    """10, 30 and 60 of 100 samples."""
    assert Uniform("samples").weights([10, 30, 60]) == pytest.approx([0.1, 0.3, 0.6])
    assert Uniform().weights([10, 30, 60]) == pytest.approx([1 / 3] * 3)
    assert FixedMalicious("samples").weights([1, 3]) == [0.25, 0.75]
    for sampler in (Uniform("samples"), Uniform()):
        assert sum(sampler.weights([7, 11, 13, 17, 1])) == pytest.approx(1.0)


def test_more_malicious_than_fit_are_refused() -> None:
    sampler = FixedMalicious(malicious_per_round=3)
    sampler.check_cohort(size=5, malicious=3, clients=10)
    for size, malicious in ((5, 2), (2, 5)):
        with pytest.raises(ConfigError, match="only 2 can be in a cohort"):
            sampler.check_cohort(size, malicious, 10)
    with pytest.raises(ConfigError, match="only 1 honest clients for 2 places"):
        sampler.check_cohort(size=5, malicious=4, clients=5)
    with pytest.raises(ConfigError, match="malicious_per_round=-1"):
        FixedMalicious(malicious_per_round=-1)


def test_poisson_cohorts_are_independent_coin_tosses() -> None:
    """1000 cohorts, p = 5/20: each client is in 250 ± 4·√(1000·¼·¾) = 250 ± 55 of them; sizes have the binomial's
    mean 5 and variance 20·¼·¾ = 3.75, within a fifth; each cohort is sorted."""
    cohorts = [Poisson().cohort(20, 5, BAD, seeded(seed)) for seed in range(1000)]
    counts = [sum(client in cohort for cohort in cohorts) for client in range(20)]
    assert all(195 <= count <= 305 for count in counts)
    sizes = [len(cohort) for cohort in cohorts]
    mean = sum(sizes) / 1000
    assert mean == pytest.approx(5, abs=0.25)
    assert sum((size - mean) ** 2 for size in sizes) / 1000 == pytest.approx(3.75, rel=0.2)
    assert all(cohort == sorted(set(cohort)) for cohort in cohorts)


def test_no_poisson_cohort_is_empty() -> None:
    """3 clients, p = 1/3: an empty one, of probability 8/27, is drawn again, so that the mean is 1/(1 − 8/27) = 1.421;
    p = 1 takes everybody."""
    sizes = [len(Poisson().cohort(3, 1, frozenset(), seeded(seed))) for seed in range(2000)]
    assert min(sizes) == 1
    assert sum(sizes) / 2000 == pytest.approx(27 / 19, abs=0.06)
    assert Poisson().cohort(7, 7, frozenset(), seeded()) == list(range(7))


@pytest.mark.parametrize("aggregator", ["mean", "multi_krum"])
def test_rounds_go_on_whatever_the_cohorts_size(aggregator: str, tmp_path: Path) -> None:
    """Six clients with p = 1/6: cohorts of one and of several; the record says how many there were."""
    words = ("sampler=poisson", "sampler.weighting=samples", "clients_per_round=1", "rounds=6", "eval.every=6")
    folder = tiny.run(tmp_path / "run", *words, f"aggregator={aggregator}")
    sizes = [event["clients"] for event in tiny.events(folder, "round")]
    assert len(sizes) == 6
    assert min(sizes) == 1 < max(sizes)
