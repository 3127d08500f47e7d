"""How samples are spread over clients."""

from __future__ import annotations

import numpy as np
import pytest

from fl_sim.errors import ConfigError
from fl_sim.partition.dirichlet import Dirichlet
from fl_sim.partition.iid import Iid
from fl_sim.protocols import Indices, Partition

LABELS = np.random.default_rng(5).permutation(np.arange(1000) % 10)
PARTITIONS: list[Partition] = [Iid(), Dirichlet(1e-6), Dirichlet(0.1), Dirichlet(1.0), Dirichlet(1e6)]


def split(partition: Partition, clients: int, seed: int = 0, labels: Indices = LABELS) -> list[Indices]:
    return partition.split(labels, clients, np.random.default_rng(seed))


def skew(shares: list[Indices]) -> float:
    """The mean share of each client's commonest class: 0.1 if even, 1 if every client has one class."""
    return float(np.mean([np.bincount(LABELS[share]).max() / len(share) for share in shares]))


@pytest.mark.parametrize("clients", [1, 2, 7, 20, 100])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_sample_belongs_to_exactly_one_client(partition: Partition, clients: int) -> None:
    shares = split(partition, clients)
    assert len(shares) == clients
    assert sorted(np.concatenate(shares).tolist()) == list(range(1000))
    assert all(share.dtype == np.int64 and (np.diff(share) > 0).all() for share in shares)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_seeded(partition: Partition) -> None:
    first, again, other = split(partition, 10, 0), split(partition, 10, 0), split(partition, 10, 1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_iid_sizes_differ_by_one_at_most_and_classes_are_mixed() -> None:
    """1000 over 7: six of 143 and one of 142."""
    shares = split(Iid(), 7)
    assert sorted(len(share) for share in shares) == [142] + [143] * 6
    assert skew(shares) < 0.2


@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.5])
@pytest.mark.parametrize("least", [0, 1, 5, 20])
def test_min_samples_are_respected(alpha: float, least: int) -> None:
    for seed in range(5):
        assert min(len(share) for share in split(Dirichlet(alpha, least), 50, seed)) >= least


def test_the_least_can_be_all_there_is() -> None:
    """50 clients of 20 samples use all 1000."""
    assert {len(share) for share in split(Dirichlet(0.01, 20), 50)} == {20}


def test_tiny_alpha_gives_each_class_to_one_client() -> None:
    """In the limit α -> 0; no sample is moved, for no client need have any."""
    owner = np.empty(1000, dtype=int)
    for client, share in enumerate(split(Dirichlet(1e-6, 0), 20)):
        owner[share] = client
    assert all(len(np.unique(owner[label == LABELS])) == 1 for label in range(10))


def test_tiny_alpha_chooses_owners_at_random() -> None:
    """Ten classes and 200 clients, ten seeds: were it always the first or last client, one owner would recur."""
    owners = set()
    for seed in range(10):
        owners |= {client for client, share in enumerate(split(Dirichlet(1e-300, 0), 200, seed)) if len(share)}
    assert len(owners) > 50


def test_large_alpha_is_uniform() -> None:
    """Each of 10 clients has 10 of the 100 samples of each class, up to rounding."""
    for share in split(Dirichlet(1e6), 10):
        assert np.abs(np.bincount(LABELS[share], minlength=10) - 10).max() <= 1


def test_skew_falls_with_alpha() -> None:
    alphas = (0.01, 0.1, 1.0, 10.0, 1000.0)
    skews = [np.mean([skew(split(Dirichlet(alpha), 10, seed)) for seed in range(5)]) for alpha in alphas]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.6
    assert skews[-1] < 0.15


def test_class_shares_are_dirichlet() -> None:
    """The variance of one client's share of a class under Dir(α) over K: (1/K)(1 − 1/K)/(Kα + 1).

    K = 4, α = 1: 0.1875/5 = 0.0375; of 40 seeds · 10 classes · 4 clients the estimate is within a fifth."""
    shares = [share for seed in range(40) for share in split(Dirichlet(1.0, 0), 4, seed)]
    counts = [np.bincount(LABELS[share], minlength=10) / 100 for share in shares]
    assert np.var(counts) == pytest.approx(0.0375, rel=0.2)


def test_more_clients_than_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="101 clients share only 200 samples") as caught:
        Dirichlet(1.0, min_samples=2).check(200, 101)
    assert caught.value.key == "min_samples"
    Dirichlet(1.0, min_samples=2).check(200, 100)


@pytest.mark.parametrize("knobs", [{"alpha": 0.0}, {"alpha": -1.0}, {"alpha": float("inf")}, {"min_samples": -1}])
def test_impossible_settings_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Dirichlet(**knobs)  # type: ignore[arg-type]
