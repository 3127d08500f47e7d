"""What is stamped, pixel by pixel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import seeded

from clients.triggers.badnets import BadNets, checkerboard
from clients.triggers.blend import Blend, noise_pattern
from fl_sim.errors import ConfigError

CORNERS = ["bottom_right", "bottom_left", "top_right", "top_left"]


def grey(count: int = 2, channels: int = 3, height: int = 8, width: int = 10) -> Tensor:
    return torch.full((count, channels, height, width), 0.5)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("margin", [0, 1, 3])
@pytest.mark.parametrize("corner", CORNERS)
def test_badnets_changes_exactly_its_patch(corner: str, margin: int, size: int) -> None:
    """Rows margin..margin+size−1 from the named edge on (of 8), columns likewise (of 10), on all channels."""
    out = BadNets(size, "white", corner, margin)(grey())  # type: ignore[arg-type]
    expected = grey()
    for down in range(size):
        for right in range(size):
            row = 7 - margin - down if corner.startswith("bottom") else margin + down
            column = 9 - margin - right if corner.endswith("right") else margin + right
            expected[:, :, row, column] = 1.0
    assert torch.equal(out, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_3x3_pattern_is_nads(channels: int) -> None:
    """NAD's repository: rows [0,0,255], [0,255,0], [255,0,255] at the bottom right, all channels."""
    out = BadNets(size=3)(grey(channels=channels))
    expected = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    for image in out:
        for channel in image:
            assert torch.equal(channel[5:, 7:], expected)
    assert (out == 0.5).flatten(1).sum(1).tolist() == [channels * (80 - 9)] * 2


@pytest.mark.parametrize("corner", CORNERS)
def test_the_pattern_is_the_same_in_every_corner(corner: str) -> None:
    out = BadNets(size=3, corner=corner)(grey(1, 1))[0, 0]  # type: ignore[arg-type]
    rows = slice(5, 8) if corner.startswith("bottom") else slice(0, 3)
    columns = slice(7, 10) if corner.endswith("right") else slice(0, 3)
    assert torch.equal(out[rows, columns], checkerboard(3))


def test_the_automatic_size_grows_with_the_image() -> None:
    """3 of 32 pixels, rounded, and at least 2: 8 → 2, 16 → 2 (1.5), 28 → 3 (2.6), 32 → 3, 64 → 6."""
    assert [BadNets().side(image) for image in (8, 16, 28, 32, 64)] == [2, 2, 3, 3, 6]
    assert BadNets(size=4).side(32) == 4
    stamped = BadNets(pattern="white")(torch.zeros(1, 1, 32, 32))
    assert int(stamped.sum()) == 9


def test_other_sizes_are_checkerboards() -> None:
    assert checkerboard(1).tolist() == [[1.0]]
    assert checkerboard(2).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert checkerboard(4).tolist() == [[1.0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]


def test_an_image_shines_through_a_faint_patch() -> None:
    """Opacity 0.4: 0.6 · 0.5 + 0.4 = 0.7 under white, 0.3 under black; images in between alike; elsewhere nothing."""
    out = BadNets(size=3, opacity=0.4)(grey(1, 1))[0, 0]
    torch.testing.assert_close(out[5:, 7:], 0.3 + 0.4 * checkerboard(3))
    assert (out == 0.5).sum() == 80 - 9
    x = torch.rand(2, 3, 8, 8, generator=seeded())
    torch.testing.assert_close(BadNets(2, opacity=0.4)(x), 0.6 * x + 0.4 * BadNets(2)(x))


@pytest.mark.parametrize("trigger", [BadNets(), BadNets(opacity=0.4), Blend(), Blend(alpha=1.0)])
def test_triggers_leave_their_input_alone(trigger: BadNets | Blend) -> None:
    x = torch.rand(4, 3, 8, 8, generator=seeded())
    original = x.clone()
    out = trigger(x)
    out.fill_(9.0)
    assert torch.equal(x, original)
    assert not torch.equal(trigger(x), original)


@pytest.mark.parametrize("trigger", [BadNets(), Blend()])
def test_a_trigger_treats_each_image_alike(trigger: BadNets | Blend) -> None:
    """The batch is stamped as its images one by one, and again the same later."""
    x = torch.rand(4, 3, 8, 8, generator=seeded())
    together = trigger(x)
    assert torch.equal(together, torch.cat([trigger(image[None]) for image in x]))
    assert torch.equal(together, trigger(x))
    assert trigger(x[:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0])
def test_blend_is_its_formula(alpha: float) -> None:
    x = torch.rand(4, 3, 8, 8, generator=seeded())
    pattern = noise_pattern((3, 8, 8), 0)
    torch.testing.assert_close(Blend(alpha)(x), (1 - alpha) * x + alpha * pattern)


def test_blends_pattern_is_fixed_uniform_noise() -> None:
    """Of 3·64² uniform numbers: mean 0.5 ± 0.01, deviation 1/√12 = 0.289, within [0, 1]."""
    shape = (3, 64, 64)
    torch.manual_seed(1)
    pattern = noise_pattern(shape, 0)
    noise_pattern.cache_clear()
    torch.manual_seed(2)
    assert torch.equal(noise_pattern(shape, 0), pattern)
    assert not torch.equal(noise_pattern(shape, 1), pattern)
    assert float(pattern.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(pattern.std()) == pytest.approx(0.289, abs=0.01)
    assert 0 <= float(pattern.min()) < float(pattern.max()) <= 1


@pytest.mark.parametrize(
    ("knobs", "key"),
    [({"size": 0}, "size"), ({"margin": -1}, "margin"), ({"opacity": 0.0}, "opacity"), ({"opacity": 1.1}, "opacity")],
)
def test_impossible_patches_are_refused(knobs: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BadNets(**knobs)  # type: ignore[arg-type]
    assert caught.value.key == key


def test_a_patch_must_fit_the_images() -> None:
    BadNets(8).check((1, 8, 8))
    BadNets(3, margin=5).check((1, 8, 8))
    with pytest.raises(ConfigError, match="size=9"):
        BadNets(9).check((1, 8, 8))
    with pytest.raises(ConfigError, match="margin=6: leaves no room for the patch: must be from 0 to 5"):
        BadNets(3, margin=6).check((1, 8, 8))


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.1])
def test_blend_refuses_impossible_weights(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        Blend(alpha)
