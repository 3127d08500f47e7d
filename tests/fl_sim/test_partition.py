"""How samples are spread over clients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fl_sim import execution
from fl_sim.composing import compose_config
from fl_sim.errors import ConfigError
from fl_sim.partition.dirichlet import Dirichlet
from fl_sim.partition.iid import Iid
from fl_sim.partition.pathological import Pathological, deal
from fl_sim.partition.quantity import Quantity
from fl_sim.partition.shards import Shards
from fl_sim.protocols import Indices, Partition

LABELS = np.random.default_rng(5).permutation(np.arange(1000) % 10)
DIRICHLETS: list[Partition] = [Dirichlet(1e-6), Dirichlet(0.1), Dirichlet(1.0), Dirichlet(1e6)]
OTHERS: list[Partition] = [Shards(), Shards(5), Pathological(10), Quantity(1e-6), Quantity(0.5), Quantity(1e6)]
PARTITIONS: list[Partition] = [Iid(), *DIRICHLETS, *OTHERS]
FROZEN: list[tuple[Partition, list[int], list[int]]] = [
    (Iid(), [143] * 6 + [142], [71539, 69980, 71508, 70610, 74633, 67892, 73338]),
    (
        Dirichlet(0.3, 20),
        [36, 104, 167, 129, 184, 292, 88],
        [19910, 45368, 84109, 68181, 87707, 145531, 48694],
    ),
]


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


def test_what_a_seed_means_stays() -> None:
    """The shares' sizes and sums of indices as they always were: published runs depend on them."""
    for partition, sizes, sums in FROZEN:
        shares = split(partition, 7)
        assert [len(share) for share in shares] == sizes
        assert [int(share.sum()) for share in shares] == sums


@pytest.mark.parametrize(
    "partition", [Dirichlet(), Quantity(), Shards(1), Pathological(1)], ids=lambda p: type(p).__name__
)
def test_more_clients_than_samples_are_refused(partition: Partition) -> None:
    with pytest.raises(ConfigError, match="101 clients share only 200 samples") as caught:
        partition.check(200, 101)  # type: ignore[attr-defined]
    assert caught.value.key == "min_samples"
    partition.check(200, 100)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Dirichlet, Quantity])
@pytest.mark.parametrize("knobs", [{"alpha": 0.0}, {"alpha": -1.0}, {"alpha": float("inf")}, {"min_samples": -1}])
def test_impossible_settings_are_refused(kind: type, knobs: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        kind(**knobs)


# Shards ---------------------------------------------------------------------------------------------------------------


def test_shards_of_mcmahan() -> None:
    """100 clients, 200 shards, here of 5 samples and of one class each, for 5 divides a class's 100: every client has
    10 samples of one class (1 in 10.5 of them) or two. With 3 shards a client, it sees three classes or fewer."""
    shares = split(Shards(), 100)
    assert {len(share) for share in shares} == {10}
    classes = [len(np.unique(LABELS[share])) for share in shares]
    assert set(classes) == {1, 2}
    assert classes.count(2) > 75
    # 300 shards of 3 or 4 samples: three a client, of which each may lie across a border.
    assert max(len(np.unique(LABELS[share])) for share in split(Shards(3), 100)) <= 6


def test_one_shard_a_client_and_a_client_a_class() -> None:
    """Ten clients, ten shards of 100 sorted samples: each has one class, and no two the same."""
    owned = [np.unique(LABELS[share]).tolist() for share in split(Shards(1), 10)]
    assert sorted(owned) == [[label] for label in range(10)]
    assert owned != sorted(owned)  # dealt at random


def test_shards_cut_a_class_at_random() -> None:
    """Which samples of its class a client gets depends on the draw, not on their order in the data."""
    parts = [split(Shards(1), 20, seed) for seed in (0, 1)]
    halves = [{tuple(share.tolist()) for share in shares} for shares in parts]
    assert not halves[0] & halves[1]


def test_shards_that_there_are_not_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be from 1 to 2") as caught:
        Shards(3).check(200, 80)
    assert caught.value.key == "shards_per_client"
    Shards(2).check(200, 80)
    with pytest.raises(ConfigError, match="shards_per_client=0"):
        Shards(0)


# Pathological ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clients", "each"), [(5, 2), (7, 3), (20, 2), (50, 1), (30, 9), (4, 10)])
def test_each_client_has_exactly_its_classes_and_each_class_is_held(clients: int, each: int) -> None:
    """Clients hold k classes; the numbers of a class's holders differ by one at most, and so do their shares of it."""
    for seed in range(5):
        shares = split(Pathological(each), clients, seed)
        table = np.array([np.bincount(LABELS[share], minlength=10) for share in shares])
        assert ((table > 0).sum(1) == each).all()
        holders = (table > 0).sum(0)
        assert holders.min() >= 1
        assert np.ptp(holders) <= 1
        assert all(np.ptp(column[column > 0]) <= 1 for column in table.T)


def test_hands_are_dealt_from_whole_decks() -> None:
    """After 5 hands of 4 from 10 cards, two decks, each card was dealt twice; no hand holds a card twice."""
    for seed in range(20):
        hands = deal(10, 5, 4, np.random.default_rng(seed))
        assert sorted(card for hand in hands for card in hand) == sorted([*range(10)] * 2)
        assert all(len(set(hand)) == 4 for hand in hands)


def test_who_has_too_few_is_filled_up_from_its_own_classes() -> None:
    """Classes of 2, 2 and 100 samples, three clients of two classes each: who holds both rare ones would have 2."""
    labels = np.repeat([0, 1, 2], [2, 2, 100])
    filled = 0
    for seed in range(20):
        shares = split(Pathological(2, min_samples=3), 3, seed, labels)
        assert sorted(np.concatenate(shares).tolist()) == list(range(104))
        assert min(len(share) for share in shares) >= 3
        assert max(len(np.unique(labels[share])) for share in shares) <= 2
        bare = split(Pathological(2, min_samples=0), 3, seed, labels)
        filled += min(len(share) for share in bare) < 3
    assert filled > 3  # so there was something to fill up


@pytest.mark.parametrize(("clients", "each"), [(4, 2), (20, 11)])
def test_classes_that_cannot_all_be_held_are_refused(clients: int, each: int) -> None:
    with pytest.raises(ConfigError, match=f"{clients} clients must hold all 10 classes") as caught:
        split(Pathological(each), clients)
    assert caught.value.key == "classes_per_client"


def test_classes_too_rare_for_the_least_are_refused() -> None:
    """The only sample of class 1 can't be two."""
    with pytest.raises(ConfigError, match="are too rare: must be 1 or less") as caught:
        split(Pathological(1), 2, 0, np.array([0, 0, 0, 1]))
    assert caught.value.key == "min_samples"
    assert [len(share) for share in split(Pathological(1, 1), 2, 0, np.array([0, 0, 0, 1]))] in ([1, 3], [3, 1])
    with pytest.raises(ConfigError, match="classes_per_client=0"):
        Pathological(0)


# Quantity -------------------------------------------------------------------------------------------------------------


def test_sizes_are_dirichlet_and_labels_mixed() -> None:
    """One client's share under Dir(1) over 4: variance 0.0375 (above), of 200 seeds · 4 clients within a fifth; a
    client's classes are in proportion: of n samples each has n/10 ± 5·√(n·0.09)."""
    sizes = []
    for seed in range(200):
        for share in split(Quantity(1.0, 0), 4, seed):
            sizes.append(len(share) / 1000)
            gap = np.abs(np.bincount(LABELS[share], minlength=10) - len(share) / 10)
            assert gap.max() <= 5 * np.sqrt(0.09 * len(share)) + 1
    assert np.var(sizes) == pytest.approx(0.0375, rel=0.2)


def test_quantity_limits() -> None:
    """α → ∞: equal sizes; α → 0: one client has all, but for what the others must have at least."""
    assert {len(share) for share in split(Quantity(1e6), 8)} <= set(range(123, 128))
    assert sorted(len(share) for share in split(Quantity(1e-6, 3), 8)) == [3] * 7 + [979]
    assert sorted(len(share) for share in split(Quantity(1e-6, 0), 8)) == [0] * 7 + [1000]


@pytest.mark.parametrize(
    "partition", [Quantity(0.05, 7), Quantity(0.05, 0), Shards(1, 20), Pathological(1, 20)], ids=lambda p: str(p)
)
def test_nobody_has_fewer_than_the_least(partition: Partition) -> None:
    for seed in range(5):
        assert min(len(share) for share in split(partition, 50, seed)) >= partition.min_samples  # type: ignore[attr-defined]


# By the configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("partition=shards partition.shards_per_client=100", "partition.shards_per_client"),
        ("partition=pathological partition.classes_per_client=11", "partition.classes_per_client"),
        ("partition=pathological partition.min_samples=100", "partition.min_samples"),
        ("partition=quantity partition.alpha=0", "partition.alpha"),
    ],
)
def test_refusals_name_the_key(line: str, key: str) -> None:
    """Those that need the labels, too, come before a run folder is made, as a setting of the partition."""
    with pytest.raises(ConfigError) as caught:
        execution.prepare(compose_config(line.split()))
    assert caught.value.key == key


# Beside Flower's ------------------------------------------------------------------------------------------------------


def theirs(partitioner: Any, clients: int) -> list[Indices]:
    """The label counts [clients, 10] that one of flwr-datasets' partitioners gives on LABELS."""
    datasets = pytest.importorskip("datasets")
    partitioner.dataset = datasets.Dataset.from_dict({"label": LABELS.tolist()})
    parts = [np.array(partitioner.load_partition(client)["label"], dtype=np.int64) for client in range(clients)]
    return [np.bincount(part, minlength=10) for part in parts]


def ours(partition: Partition, clients: int) -> list[Indices]:
    return [np.bincount(LABELS[share], minlength=10) for share in split(partition, clients)]


def concentration(tables: list[Indices]) -> float:
    """The mean share of each client's commonest class, of clients with more than ten samples or of all."""
    large = [table for table in tables if table.sum() > 10] or tables
    return float(np.mean([table.max() / table.sum() for table in large]))


@pytest.mark.filterwarnings("default")
def test_statistics_are_those_of_flwr_datasets() -> None:
    """The same samples by Flower's partitioners: equal sizes where sizes are fixed, equal numbers of classes where
    these are, and the same concentration of labels at a small, a middling and a large α, within sampling error."""
    flower = pytest.importorskip("flwr_datasets.partitioner")
    by: dict[str, Any] = {"partition_by": "label", "seed": 1}
    pair = theirs(flower.IidPartitioner(7), 7), ours(Iid(), 7)
    sizes = [sorted(int(table.sum()) for table in tables) for tables in pair]
    assert sizes[0] == sizes[1]
    pair = theirs(flower.ShardPartitioner(100, num_shards_per_partition=2, **by), 100), ours(Shards(), 100)
    for tables in pair:
        assert {table.sum() for table in tables} == {10}
        assert {(table > 0).sum() for table in tables} == {1, 2}
    assert concentration(pair[0]) == pytest.approx(concentration(pair[1]), abs=0.06)
    pair = theirs(flower.PathologicalPartitioner(20, num_classes_per_partition=3, **by), 20), ours(Pathological(3), 20)
    for tables in pair:
        assert {(table > 0).sum() for table in tables} == {3}
    for alpha, slack in ((0.05, 0.15), (1.0, 0.1), (1e4, 0.02)):
        maker = flower.DirichletPartitioner(20, alpha=alpha, min_partition_size=0, self_balancing=False, **by)
        pair = theirs(maker, 20), ours(Dirichlet(alpha, 0), 20)
        assert concentration(pair[0]) == pytest.approx(concentration(pair[1]), abs=slack)
