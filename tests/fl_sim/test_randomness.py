"""Every draw is named by a seed and a path."""

from __future__ import annotations

import hashlib

import pytest
import torch

from fl_sim.randomness import generator, key, numpy_generator


def draw(seed: int, *path: str | int) -> list[float]:
    return torch.rand(4, generator=generator(seed, *path)).tolist()


def test_key_is_the_first_63_bits_of_the_hashed_path() -> None:
    digest = hashlib.sha256(b"(3, 'client', 5, 2)").hexdigest()
    assert key(3, "client", 5, 2) == int(digest[:16], 16) // 2


def test_same_path_same_draw() -> None:
    assert draw(1, "client", 2, 3) == draw(1, "client", 2, 3)
    assert numpy_generator(1, "a").random() == numpy_generator(1, "a").random()


@pytest.mark.parametrize(
    "other",
    [(2, "client", 2, 3), (1, "cohort", 2, 3), (1, "client", 3, 2), (1, "client", 23), (1, "client", 2), (1,)],
)
def test_every_part_of_the_path_matters(other: tuple[int, ...]) -> None:
    assert draw(1, "client", 2, 3) != draw(*other)


def test_a_number_is_not_its_name() -> None:
    assert key(0, 1) != key(0, "1")
    assert key(0, "a", "b") != key(0, "a', 'b")
    assert draw(0, 1) != draw(0, "1")


def test_neighbouring_seeds_draw_independently() -> None:
    """Of 1000 seeds' first uniform numbers the mean is 0.5 ± 4 · 0.2887/√1000 = 0.5 ± 0.037."""
    first = torch.tensor([draw(seed, "x")[0] for seed in range(1000)])
    assert abs(float(first.mean()) - 0.5) < 0.037
    assert len(first.unique()) == 1000


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draw(5, "x")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert draw(5, "x") == first


def test_generators_live_on_the_cpu() -> None:
    assert generator(0).device.type == "cpu"
