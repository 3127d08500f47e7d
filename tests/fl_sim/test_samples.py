"""Batches, stratified parts and the two ways to store an image."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor
from toys import numbered, seeded, spotted

from fl_sim.samples import Samples, batch_sizes, like, stratified_indices, to_pixels


@pytest.mark.parametrize(
    ("samples", "size", "expected"),
    [
        (8, 4, [4, 4]),
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 5]),  # a rest of one joins the batch before it
        (5, 4, [5]),
        (3, 4, [3]),
        (1, 4, [1]),  # nothing to join
        (3, 1, [1, 1, 1]),
        (0, 4, []),
    ],
)
def test_batch_sizes(samples: int, size: int, expected: list[int]) -> None:
    assert batch_sizes(samples, size) == expected
    assert sum(expected) == samples


@pytest.mark.parametrize("count", [7, 8, 9, 33])
def test_an_epoch_uses_each_sample_once_with_its_own_label(count: int) -> None:
    samples = Samples(torch.arange(count).float()[:, None, None, None], torch.arange(count) + 100)
    batches = list(samples.batches(8, seeded()))
    assert [len(y) for _, y in batches] == batch_sizes(count, 8)
    x, y = torch.cat([x.flatten() for x, _ in batches]), torch.cat([y for _, y in batches])
    assert torch.equal(x + 100, y.float())
    assert sorted(y.tolist()) == list(range(100, 100 + count))


def test_epochs_are_shuffled_anew_and_repeat_with_the_generator() -> None:
    samples = numbered([0] * 50)

    def order(rng: Generator) -> list[float]:
        return torch.cat([x[:, 0, 0, 0] for x, _ in samples.batches(8, rng)]).tolist()

    rng = seeded()
    first, second = order(rng), order(rng)
    assert first != sorted(first)
    assert first != second
    assert first == order(seeded())


def test_transforms_run_in_order_on_pixels_of_each_batch_only() -> None:
    """Pixel 255 is 1.0 in the batch; (1 + 1) · 3 = 6 and not 1 · 3 + 1 = 4."""
    samples = Samples(torch.full((4, 1, 2, 2), 255, dtype=torch.uint8), torch.zeros(4, dtype=torch.long))

    def add(x: Tensor, y: Tensor, _rng: Generator) -> tuple[Tensor, Tensor]:
        return x + 1, y + 1

    def triple(x: Tensor, y: Tensor, _rng: Generator) -> tuple[Tensor, Tensor]:
        return x * 3, y * 3

    changed = samples.then(add).then(triple)
    x, y = next(changed.batches(4, seeded()))
    assert x.unique().tolist() == [6.0]
    assert y.unique().tolist() == [3]
    untouched, labels = next(changed.chunks(4))
    assert untouched.unique().tolist() == [1.0]
    assert labels.unique().tolist() == [0]
    assert samples.transforms == ()
    assert changed[:2].transforms == (add, triple)


def test_chunks_are_in_order_and_complete() -> None:
    samples = spotted(10)
    chunks = list(samples.chunks(4))
    assert [len(y) for _, y in chunks] == [4, 4, 2]
    assert torch.equal(torch.cat([x for x, _ in chunks]), samples.images)
    assert torch.equal(torch.cat([y for _, y in chunks]), samples.labels)


def test_every_byte_survives_the_way_to_pixels_and_back() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    pixels = to_pixels(bytes_)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels.flatten()[[0, 51, 255]], torch.tensor([0.0, 0.2, 1.0]))  # 51/255 = 1/5
    assert torch.equal(like(pixels, bytes_), bytes_)


def test_pixels_are_rounded_to_the_nearest_byte_and_clamped() -> None:
    """0.5 · 255 = 127.5 -> 128 (to even), 0.499 · 255 = 127.2 -> 127."""
    pixels = torch.tensor([0.5, 0.499, 1.2, -0.1])
    assert like(pixels, torch.zeros(1, dtype=torch.uint8)).tolist() == [128, 127, 255, 0]


def test_float_images_stay_as_they_are() -> None:
    pixels = torch.tensor([0.123])
    assert to_pixels(pixels) is pixels
    assert like(pixels, torch.zeros(1)) is pixels


def test_images_and_labels_must_match() -> None:
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        Samples(torch.zeros(3, 1, 2, 2), torch.zeros(2, dtype=torch.long))


def test_stratified_shares_are_exact() -> None:
    """A fifth of 50/30/20 is 10/6/4."""
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    first, second = stratified_indices(labels, 0.2, seeded())
    assert labels[first].bincount().tolist() == [10, 6, 4]
    assert labels[second].bincount().tolist() == [40, 24, 16]
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(100))
    assert first.tolist() == sorted(first.tolist())


def test_the_largest_rests_get_what_rounding_leaves() -> None:
    """0.3 of 5/4/9 is 1.5, 1.2, 2.7: floors 1, 1, 2 make 4, of round(5.4) = 5 one is missing and goes to 2.7."""
    labels = torch.tensor([0] * 5 + [1] * 4 + [2] * 9)
    first, _ = stratified_indices(labels, 0.3, seeded())
    assert labels[first].bincount().tolist() == [1, 1, 3]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.29, 1 / 3, 0.57, 0.95])
@pytest.mark.parametrize("each", [7, 100, 143, 5000])
def test_stratified_totals_for_awkward_shares(share: float, each: int) -> None:
    """The first part has round(share · N) samples and each class within one of share · count."""
    labels = torch.arange(each * 10) % 10
    first, second = stratified_indices(labels, share, seeded())
    assert len(first) == round(share * each * 10)
    assert len(first) + len(second) == each * 10
    counts = labels[first].bincount(minlength=10)
    assert (counts - share * each).abs().max() < 1 + 1e-3


def test_stratified_draws_depend_on_the_generator() -> None:
    samples = spotted(40)
    same = samples.stratified(0.5, seeded(1))[0], samples.stratified(0.5, seeded(1))[0]
    other = samples.stratified(0.5, seeded(2))[0]
    assert torch.equal(same[0].images, same[1].images)
    assert not torch.equal(same[0].images, other.images)
    assert same[0].labels.bincount().tolist() == [5, 5, 5, 5]
