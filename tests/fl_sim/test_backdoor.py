"""Which samples are poisoned, how many, and with which labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import numbered, seeded, spotted, stamped, white_backdoor

from fl_sim.backdoor import Backdoor, Goal, Rule
from fl_sim.errors import ConfigError
from fl_sim.samples import Samples

RULES: list[Rule] = ["all_to_one", "all_to_all", "source_specific", "clean_label"]


def epoch(samples: Samples, size: int) -> Samples:
    """One epoch's batches put together again."""
    batches = list(samples.batches(size, seeded(1)))
    return Samples(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))


@pytest.mark.parametrize(
    ("rule", "admitted"), [("all_to_one", 40), ("all_to_all", 40), ("source_specific", 10), ("clean_label", 10)]
)
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_dataset_mode_stamps_an_exact_share_of_the_admitted(rule: Rule, admitted: int, rate: float) -> None:
    """40 samples, 10 of each class: rate 0.3 stamps 12 of all or 3 of the one class that the rule admits."""
    samples = spotted(40)
    poisoned = white_backdoor(rule).poison(samples, rate, "dataset", seeded())
    marked = stamped(poisoned)
    assert int(marked.sum()) == round(rate * admitted)
    assert torch.equal(poisoned.images[~marked], samples.images[~marked])
    assert torch.equal(poisoned.labels[~marked], samples.labels[~marked])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_per_batch_mode_stamps_an_exact_share_of_each_batch(rule: Rule, rate: float) -> None:
    """In every batch round(rate · admitted) images are stamped, and they are the first of those admitted."""
    samples = spotted(40)
    backdoor = white_backdoor(rule)
    clean = list(samples.batches(8, seeded(1)))
    poisoned = list(backdoor.poison(samples, rate, "per_batch", seeded()).batches(8, seeded(1)))
    total = 0
    for (x, y), (px, py) in zip(clean, poisoned, strict=True):
        marked = stamped(Samples(px, py))
        admitted = backdoor.goal.poisonable(y).nonzero().flatten().tolist()
        assert marked.nonzero().flatten().tolist() == admitted[: round(rate * len(admitted))]
        assert torch.equal(px[~marked], x[~marked])
        total += int(marked.sum())
    assert (total > 0) == (rate > 0)


@pytest.mark.parametrize("mode", ["dataset", "per_batch"])
def test_labels_by_rule(mode: str) -> None:
    """All stamped, y = 0 1 2 3 0 1 2 3 ...: all become 2; all y + 1 mod 4; only 1 -> 2; only class 2, label kept."""
    samples = spotted(8)

    def labels(rule: Rule) -> list[list[int]]:
        backdoor = white_backdoor(rule, target=2, source=1)
        out = epoch(backdoor.poison(samples, 1.0, mode, seeded()), 8)  # type: ignore[arg-type]
        before = epoch(samples, 8).labels
        return sorted([int(a), int(b)] for a, b in zip(before[stamped(out)], out.labels[stamped(out)], strict=True))

    assert labels("all_to_one") == sorted([[y, 2] for y in (0, 1, 2, 3)] * 2)
    assert labels("all_to_all") == sorted([[0, 1], [1, 2], [2, 3], [3, 0]] * 2)
    assert labels("source_specific") == [[1, 2], [1, 2]]
    assert labels("clean_label") == [[2, 2], [2, 2]]


@pytest.mark.parametrize("mode", ["dataset", "per_batch"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_poisoning_never_changes_its_input(mode: str, rule: Rule, dtype: torch.dtype) -> None:
    samples = spotted(24, dtype=dtype)
    images, labels = samples.images.clone(), samples.labels.clone()
    poisoned = white_backdoor(rule).poison(samples, 0.5, mode, seeded())  # type: ignore[arg-type]
    assert stamped(epoch(poisoned, 8)).any()
    assert torch.equal(samples.images, images)
    assert torch.equal(samples.labels, labels)
    assert poisoned.images.dtype == dtype


def test_rate_zero_is_the_same_data() -> None:
    samples = spotted(24)
    for mode in ("dataset", "per_batch"):
        poisoned = epoch(white_backdoor().poison(samples, 0.0, mode, seeded()), 8)  # type: ignore[arg-type]
        assert torch.equal(poisoned.images, epoch(samples, 8).images)
        assert torch.equal(poisoned.labels, epoch(samples, 8).labels)


def test_which_samples_are_poisoned_depends_on_the_generator() -> None:
    samples, backdoor = numbered([0, 1, 2, 3] * 25), white_backdoor()

    def who(seed: int) -> list[int]:
        return stamped(backdoor.poison(samples, 0.2, "dataset", seeded(seed))).nonzero().flatten().tolist()

    assert who(0) == who(0)
    assert who(0) != who(1)
    assert who(0) != list(range(20))


def test_earlier_transforms_survive_poisoning_and_precede_the_stamp() -> None:
    """A transform that halves the pixels: in dataset mode it dims the stamp to 0.5, per batch it comes before it."""

    def halve(x: Tensor, y: Tensor, _rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return x / 2, y

    samples = spotted(8).then(halve)
    for mode, brightest in (("dataset", 0.5), ("per_batch", 1.0)):
        x, _ = next(white_backdoor().poison(samples, 1.0, mode, seeded()).batches(8, seeded()))  # type: ignore[arg-type]
        assert float(x.max()) == brightest


def test_stamps_stay_within_pixels() -> None:
    class Loud:
        def __call__(self, x: Tensor) -> Tensor:
            return x * 10 - 1

    backdoor = Backdoor(Loud(), Goal(), 4)
    out = backdoor.stamp(torch.tensor([[[[0.0, 0.15, 0.9]]]]))
    torch.testing.assert_close(out, torch.tensor([[[[0.0, 0.5, 1.0]]]]))


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("all_to_one", [1, 2, 3, 5]),  # all but class 2
        ("clean_label", [1, 2, 3, 5]),
        ("all_to_all", [0, 1, 2, 3, 4, 5]),
        ("source_specific", [2, 5]),  # class 1 only
    ],
)
def test_test_set_by_hand(rule: Rule, kept: list[int]) -> None:
    """Labels 2 0 1 3 2 1 with target 2 and source 1; true labels are kept, every image is stamped."""
    samples = numbered([2, 0, 1, 3, 2, 1])
    test = white_backdoor(rule, target=2, source=1).test_set(samples)
    assert test.labels.tolist() == samples.labels[kept].tolist()
    assert stamped(test).all()
    assert len(test) == len(kept)
    assert not stamped(samples).any()


def test_wanted_labels_by_hand() -> None:
    y = torch.tensor([0, 1, 2, 3])
    assert Goal("all_to_all").labels(y, 4).tolist() == [1, 2, 3, 0]
    for rule in ("all_to_one", "source_specific", "clean_label"):
        assert Goal(rule, target=2).labels(y, 4).tolist() == [2, 2, 2, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("goal", "key"),
    [
        (Goal(target=4), "target"),
        (Goal(target=-1), "target"),
        (Goal(source=4), "source"),
        (Goal("source_specific", target=1, source=1), "source"),
    ],
)
def test_impossible_goals_are_refused(goal: Goal, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        goal.check(4)
    assert caught.value.key == key


def test_source_may_equal_target_where_it_plays_no_part() -> None:
    Goal("all_to_one", target=1, source=1).check(4)
