"""Augmentation of whole batches: a draw for each sample, checked against one image at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import seeded

from fl_sim.augment import Augment, cutout, random_crop, random_flip
from fl_sim.errors import ConfigError


def batch(count: int = 64, size: int = 6) -> Tensor:
    """Every pixel has a value of its own, none is zero."""
    return (torch.arange(count * 2 * size * size).float() + 1).view(count, 2, size, size)


def naive_shift(image: Tensor, down: int, right: int) -> Tensor:
    """The image moved by whole pixels, one pixel at a time; zeros come in."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            source_row, source_column = row - down, column - right
            if 0 <= source_row < height and 0 <= source_column < width:
                out[:, row, column] = image[:, source_row, source_column]
    return out


def test_each_crop_is_one_of_the_possible_shifts() -> None:
    x = batch()
    shifts = set()
    for image, cropped in zip(x, random_crop(x, 1, seeded()), strict=True):
        found = [
            (down, right)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            if torch.equal(cropped, naive_shift(image, down, right))
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) == 9  # 64 images miss one of 9 shifts with probability below 9 · (8/9)^64 = 0.5 %: not here


def test_each_flip_is_a_mirror_image_or_none() -> None:
    """Of 64 fair coins between 16 and 48 are heads, but for one in 10^4 seeds."""
    x = batch()
    out = random_flip(x, seeded())
    kept = (out == x).flatten(1).all(1)
    mirrored = (out == x.flip(3)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 16 < int(mirrored.sum()) < 48


@pytest.mark.parametrize("size", [1, 2, 3])
def test_cutout_blackens_one_square_cut_off_at_the_edge(size: int) -> None:
    """size² pixels on both channels unless the centre is so near an edge that a part falls outside."""
    x = batch(count=200, size=8)
    black = cutout(x, size, seeded()) == 0
    assert torch.equal(black[:, 0], black[:, 1])
    heights, widths = black[:, 0].any(2).sum(1), black[:, 0].any(1).sum(1)
    assert torch.equal(black[:, 0].sum((1, 2)), heights * widths)  # a rectangle
    assert int(heights.max()) == int(widths.max()) == size
    assert int(heights.min()) >= (size + 1) // 2
    assert torch.equal(cutout(x, size, seeded())[~black], x[~black])
    assert len({tuple(mask.flatten().tolist()) for mask in black[:, 0]}) > 30  # each sample draws its own


def test_off_is_the_identity_and_draws_nothing() -> None:
    x, y, rng = batch(), torch.arange(64), seeded()
    before = rng.get_state()
    out, labels = Augment()(x, y, rng)
    assert out is x
    assert labels is y
    assert torch.equal(rng.get_state(), before)


def test_the_same_generator_gives_the_same_result_and_leaves_the_input() -> None:
    x, y = batch(), torch.arange(64)
    original = x.clone()
    augment = Augment(crop=2, flip=True, cutout=2)
    first, labels = augment(x, y, seeded(3))
    assert torch.equal(first, augment(x, y, seeded(3))[0])
    assert not torch.equal(first, augment(x, y, seeded(4))[0])
    assert torch.equal(x, original)
    assert torch.equal(labels, y)
    assert first.shape == x.shape


def test_augment_is_crop_then_flip_then_cutout_from_one_generator() -> None:
    x, y = batch(), torch.arange(64)
    rng = seeded(5)
    expected = cutout(random_flip(random_crop(x, 1, rng), rng), 3, rng)
    assert torch.equal(Augment(crop=1, flip=True, cutout=3)(x, y, seeded(5))[0], expected)


@pytest.mark.parametrize("key", ["crop", "cutout"])
def test_negative_sizes_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}=-1"):
        Augment(**{key: -1})
