"""The data sets and the server's held-out share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fl_sim.data.cifar10 import Cifar10
from fl_sim.data.dataset import Dataset, hold_out, resized
from fl_sim.data.digits import Digits
from fl_sim.data.synthetic import Synthetic
from fl_sim.errors import ConfigError
from fl_sim.samples import Samples


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return Digits().load()


def small(**knobs: float) -> Synthetic:
    return Synthetic(**({"image_size": 8, "samples": 400, "test_samples": 200} | knobs))  # type: ignore[arg-type]


def same(a: Samples, b: Samples) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_digits_counts_and_range(digits: Dataset) -> None:
    """A fifth of the 1,797 images is 359.4: 359 are the test set."""
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    assert len(digits.train) == Digits().facts.train_samples
    for part in (digits.train, digits.test):
        assert part.images.dtype == torch.uint8
        assert tuple(part.images.shape[1:]) == Digits().facts.shape == (1, 8, 8)
        assert part.labels.dtype == torch.long
        assert (int(part.images.min()), int(part.images.max())) == (0, 255)


def test_digits_are_stratified(digits: Dataset) -> None:
    """Each class has a fifth of its images in the test set, to within one image."""
    train, test = digits.train.labels.bincount(), digits.test.labels.bincount()
    assert ((train + test) / 5 - test).abs().max() < 1
    assert len(test) == 10


def test_digits_hold_sklearns_pixels(digits: Dataset) -> None:
    """Sixteen levels, scaled: level 16 is 255 and level 1 is round(15.94) = 16; every image is one of the original."""
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    levels = torch.cat([digits.train.images, digits.test.images]).unique().tolist()
    assert levels == [round(level * 255 / 16) for level in range(17)]
    original = [(*(image * 255 / 16).round().tolist(), label) for image, label in zip(images, targets, strict=True)]
    ours = [
        (*image.flatten().tolist(), int(label))
        for part in (digits.train, digits.test)
        for image, label in zip(part.images, part.labels, strict=True)
    ]
    assert sorted(ours) == sorted(original)


def test_digits_are_the_same_every_time(digits: Dataset) -> None:
    torch.manual_seed(123)
    again = Digits(clean_fraction=0.3).load()
    assert same(again.train, digits.train)
    assert same(again.test, digits.test)


def test_digits_mean_and_std_are_the_datas(digits: Dataset) -> None:
    pixels = digits.train.images / 255
    facts = Digits().facts
    assert facts.mean == pytest.approx([float(pixels.mean())], abs=0.01)
    assert facts.std == pytest.approx([float(pixels.std())], abs=0.01)


def test_digits_at_another_size(digits: Dataset) -> None:
    """Enlarging keeps the mean brightness, and the labels."""
    large = Digits(image_size=16).load()
    assert tuple(large.test.images.shape[1:]) == Digits(image_size=16).facts.shape == (1, 16, 16)
    assert torch.equal(large.test.labels, digits.test.labels)
    assert float(large.test.images.float().mean()) == pytest.approx(float(digits.test.images.float().mean()), rel=0.02)


def test_resizing_by_hand() -> None:
    """Halving with antialiasing a flat image leaves it flat; the same size is the same tensor."""
    flat = torch.full((2, 1, 16, 16), 77, dtype=torch.uint8)
    assert resized(flat, 8).unique().tolist() == [77]
    assert resized(flat, 8).shape == (2, 1, 8, 8)
    assert resized(flat, 16) is flat


def test_synthetic_knobs_set_the_shape() -> None:
    source = small(image_size=12, channels=1, classes=7, samples=70, test_samples=21)
    data = source.load()
    assert source.facts.shape == (1, 12, 12)
    assert tuple(data.train.images.shape) == (70, 1, 12, 12)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.bincount().tolist() == [10] * 7
    assert data.test.labels.bincount().tolist() == [3] * 7
    assert source.facts.train_samples == 70
    assert len(source.facts.mean) == len(source.facts.std) == 1


def test_synthetic_classes_are_balanced_when_they_do_not_divide_the_samples() -> None:
    """103 of 10 classes: the first three classes have 11."""
    counts = small(samples=103).load().train.labels.bincount().tolist()
    assert counts == [11] * 3 + [10] * 7


def test_synthetic_is_the_same_every_time_and_differs_by_pattern_seed() -> None:
    torch.manual_seed(1)
    first = small().load()
    torch.manual_seed(2)
    assert same(first.train, small().load().train)
    assert same(first.test, small().load().test)
    assert not same(first.train, small(pattern_seed=1).load().train)
    assert not torch.equal(first.train.images[:200], first.test.images)


def test_a_subset_of_what_needs_no_files(digits: Dataset) -> None:
    """A tenth: round(143.8) = 144 and 36 of the digits, 40 and 20 of synthetic's; each class's share to within one."""
    part, drawn = Digits(subset=0.1).load(), small(subset=0.1).load()
    assert (len(part.train), len(part.test)) == (144, 36)
    assert (len(drawn.train), len(drawn.test)) == (40, 20)
    assert (Digits(subset=0.1).facts.train_samples, small(subset=0.1).facts.train_samples) == (144, 40)
    assert ((part.train.labels.bincount() - digits.train.labels.bincount() / 10).abs() < 1).all()
    assert rows(part.test.images, torch.arange(36)) <= rows(digits.test.images, torch.arange(359))
    assert same(part.train, Digits(subset=0.1, clean_fraction=0.2).load().train)


def nearest_class_mean(data: Dataset) -> float:
    """The accuracy of the simplest classifier."""
    x, y = data.train.images.flatten(1).float(), data.train.labels
    means = torch.stack([x[y == label].mean(0) for label in range(int(y.max()) + 1)])
    predicted = torch.cdist(data.test.images.flatten(1).float(), means).argmin(1)
    return float((predicted == data.test.labels).float().mean())


def test_difficulty_makes_it_harder() -> None:
    easy, middle, hard = (nearest_class_mean(small(difficulty=d).load()) for d in (0.0, 1.0, 2.0))
    assert easy > 0.95
    assert easy > middle > hard
    assert 0.1 < hard < 0.7


def test_synthetic_facts_are_about_right() -> None:
    """Patterns of variance 1 times 50/255 = 0.196 around 0.5; noise adds to it."""
    data = small(difficulty=0.0).load()
    pixels = data.train.images / 255
    assert float(pixels.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(pixels.std()) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(
    ("knobs", "key"),
    [
        ({"channels": 2}, "channels"),
        ({"classes": 1}, "classes"),
        ({"samples": 9}, "samples"),
        ({"test_samples": 9}, "test_samples"),
        ({"difficulty": 2.5}, "difficulty"),
        ({"image_size": 7}, "image_size"),
        ({"clean_fraction": 1.0}, "clean_fraction"),
        ({"clean_fraction": -0.1}, "clean_fraction"),
        ({"subset": 0.0}, "subset"),
        ({"subset": 1.1}, "subset"),
        ({"subset": 0.04}, "subset"),  # 8 test images for 10 classes
    ],
)
def test_impossible_settings_are_refused(knobs: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small(**knobs)
    assert caught.value.key == key


def rows(images: Tensor, at: Tensor) -> set[tuple[int, ...]]:
    return {tuple(image.flatten().tolist()) for image in images[at]}


def test_the_clean_set_is_stratified_and_no_clients() -> None:
    """A tenth of 400, 4 of each of 10 classes; the other 360 indices are all others."""
    train = small().load().train
    clean, rest = hold_out(train, 0.1, seed=0)
    assert clean is not None
    assert clean.labels.bincount().tolist() == [4] * 10
    assert len(rest) == len(rest.unique()) == 360
    everything = rows(train.images, torch.arange(400))
    assert len(everything) == 400  # no two images are equal, so that they can be told apart
    held_out = rows(clean.images, torch.arange(40))
    assert held_out | rows(train.images, rest) == everything
    assert not held_out & rows(train.images, rest)


def test_the_clean_set_depends_on_its_seed() -> None:
    train = small().load().train
    first, again, other = (hold_out(train, 0.1, seed)[0] for seed in (0, 0, 1))
    assert first is not None
    assert again is not None
    assert other is not None
    assert same(first, again)
    assert not same(first, other)


def test_no_clean_set_leaves_everything_to_the_clients() -> None:
    clean, rest = hold_out(small().load().train, 0.0, seed=0)
    assert clean is None
    assert rest.tolist() == list(range(400))


def test_absent_cifar10_is_one_clear_complaint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Cifar10(root=str(tmp_path)).load()
    assert caught.value.key == "root"
    assert "data.download=true" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_cifar10_facts() -> None:
    facts = Cifar10(image_size=16).facts
    assert (facts.shape, facts.classes, facts.train_samples) == ((3, 16, 16), 10, 50_000)
