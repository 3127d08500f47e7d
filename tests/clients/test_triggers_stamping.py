"""Triggers without training: what each does to pixels, by its formula, and what all of them promise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toys import seeded, small_model, spotted

from clients.triggers.a_blend import ABlend, pieces_mask
from clients.triggers.a_patch import APatch, overlay, shapes
from clients.triggers.blend import noise_pattern
from clients.triggers.cba import Cba, classmates, composed
from clients.triggers.cl import Cl, hardened
from clients.triggers.dba import Dba, parts_of
from clients.triggers.drawing import at_size, blurred, by_content, texture
from clients.triggers.edge_case import EdgeCase
from clients.triggers.refool import Refool, reflected
from clients.triggers.semantic import Semantic
from clients.triggers.sig import Sig, stripes
from clients.triggers.svd import Svd, major
from clients.triggers.wanet import WaNet, warped, warping_field
from clients.triggers.wave import Wave, haar, inverse_haar
from fl_sim.backdoor import Backdoor, Goal
from fl_sim.errors import ConfigError
from fl_sim.protocols import Covering, Crafting, Learned, Trigger, Workshop
from fl_sim.samples import Samples

ALL: list[Trigger] = [
    *(Sig(), Cl(steps=2), Refool(), WaNet(), ABlend(), APatch(), Svd(), Wave(), Dba(), Cba(), Semantic(), EdgeCase())
]
SHAPES = [(1, 8, 8), (3, 16, 16), (3, 32, 32), (1, 28, 28), (3, 64, 64)]


def named(value: object) -> str:
    return type(value).__name__ if not isinstance(value, tuple) else "x".join(map(str, value))


def images(count: int = 4, shape: tuple[int, int, int] = (3, 16, 16), seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=seeded(seed))


def workshop(shape: tuple[int, int, int] = (3, 16, 16), rank: int = 0, attackers: int = 4, **goal: object) -> Workshop:
    model = small_model(shape=shape).eval().requires_grad_(False)
    return Workshop(model, Goal(**goal), 4, seeded(5), rank, attackers)  # type: ignore[arg-type]


def taught(trigger: Trigger, shape: tuple[int, int, int], samples: Samples | None = None) -> Trigger:
    """The trigger as the scorer has it: recalled from the record, if it learns."""
    if not isinstance(trigger, Learned):
        return trigger
    return trigger.recall(trigger.learn(samples or spotted(12, shape=shape), workshop(shape)))


# What all promise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=named)
@pytest.mark.parametrize("trigger", ALL, ids=named)
def test_every_image_is_stamped_alike_and_none_is_touched(trigger: Trigger, shape: tuple[int, int, int]) -> None:
    """A batch is stamped as its images alone, twice the same, within [0, 1]; the input stays bit-identical."""
    x = images(3, shape)
    original = x.clone()
    for made in (trigger, taught(trigger, shape)):
        backdoor = Backdoor(made, Goal(), 4)
        together = backdoor.stamp(x)
        torch.testing.assert_close(together, torch.cat([backdoor.stamp(one[None]) for one in x]), rtol=0, atol=1e-6)
        assert torch.equal(together, backdoor.stamp(x))
        assert (together.shape, together.dtype) == (x.shape, x.dtype)
        assert torch.equal(together, x) == isinstance(trigger, Semantic)
        together.fill_(9)
        assert torch.equal(x, original)
        assert backdoor.stamp(x[:0]).shape == (0, *shape)


@pytest.mark.parametrize("trigger", ALL, ids=named)
def test_poisoning_changes_exactly_as_many_as_asked(trigger: Trigger) -> None:
    """Of 40 images half of those that the rule admits are relabelled (or, with true labels, only changed).

    What else is changed is cover: as many as asked for each poisoned one, at most half of the rest, labels kept.
    """
    samples = Samples(images(40, (1, 8, 8)), torch.arange(40) % 4)
    goal = Goal("auto", target=0, source=1).resolved(trigger)
    made = replace(trigger, share=1.0) if isinstance(trigger, Semantic) else trigger  # type: ignore[type-var]
    made = taught(made, (1, 8, 8), samples)
    shop = replace(workshop((1, 8, 8)), goal=goal)
    poisoned = Backdoor(made, goal, 4).poison(samples, 0.5, "dataset", seeded(3), shop)
    admitted = {"all_to_one": 40, "clean_label": 10, "source_specific": 10}[goal.rule]
    changed = (poisoned.images != samples.images).flatten(1).any(1)
    moved = poisoned.labels != samples.labels
    stamps = admitted // 2
    cover = min(round(getattr(made, "cover", 0) * stamps), (admitted - stamps) // 2)
    if goal.rule == "clean_label":
        assert not moved.any()
        assert set(samples.labels[changed].tolist()) == {0}
    elif goal.rule == "source_specific":
        assert (int(moved.sum()), set(samples.labels[moved].tolist())) == (stamps, {1})
        assert set(poisoned.labels[moved].tolist()) == {0}
    if isinstance(made, Semantic):
        assert not changed.any()
    elif isinstance(made, Cba):  # cover of the partner class, and images without a classmate in cover, stay
        assert stamps <= int(changed.sum()) <= stamps + cover
    else:
        assert int(changed.sum()) == stamps + cover


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: Sig(delta=0.0), "delta"),
        (lambda: Sig(frequency=0.0), "frequency"),
        (lambda: Cl(epsilon=2.0), "epsilon"),
        (lambda: Cl(size=0), "size"),
        (lambda: Cl(steps=-1), "steps"),
        (lambda: Refool(reflections=0), "reflections"),
        (lambda: Refool(transmission=1.0), "transmission"),
        (lambda: WaNet(grid=1), "grid"),
        (lambda: WaNet(cover=-1.0), "cover"),
        (lambda: ABlend(pieces=15), "pieces"),
        (lambda: ABlend(shown=17), "shown"),
        (lambda: APatch(opacities=(0.5,)), "opacities"),
        (lambda: APatch(9).check((1, 16, 16)), "size"),
        (lambda: Svd(16).check((1, 16, 16)), "replaced"),
        (lambda: Wave(residual=0.0), "residual"),
        (lambda: Wave().check((1, 9, 9)), ""),
        (lambda: Dba(length=8).check((1, 16, 16)), "length"),
        (lambda: Cba(partners=0), "partners"),
        (lambda: Semantic(share=0.0), "share"),
        (lambda: Semantic("redness").check((1, 8, 8)), "feature"),
        (lambda: EdgeCase("/nowhere"), "folder"),
    ],
)
def test_impossible_settings_are_refused(build: object, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build()  # type: ignore[operator]
    assert caught.value.key == key


# Each by its formula --------------------------------------------------------------------------------------------------


def test_strengths_grow_as_images_shrink() -> None:
    """0.1 at 32 pixels and above; at half the side twice as much keeps δ²·pixels; never above 1."""
    strengths = [at_size(0.1, torch.zeros(1, 1, side, side)) for side in (64, 32, 16, 8, 2)]
    assert strengths == pytest.approx([0.1, 0.1, 0.2, 0.4, 1.0])


def test_choices_by_content_hang_on_the_pixels_alone() -> None:
    """Uniform images of value k/255 and 4 pixels sum to 4k; modulo 3."""
    x = torch.tensor([0, 1, 2, 5]).view(4, 1, 1, 1).expand(4, 1, 2, 2) / 255
    assert by_content(x, 3).tolist() == [0, 1, 2, 2]


def test_blurring_keeps_the_light() -> None:
    """A normalised window: a flat image stays; a point spreads evenly about itself."""
    torch.testing.assert_close(blurred(torch.full((1, 3, 8, 8), 0.4), 1.5), torch.full((1, 3, 8, 8), 0.4))
    point = torch.zeros(1, 1, 17, 17)
    point[0, 0, 8, 8] = 1.0
    out = blurred(point, 1.0)
    assert float(out.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(out[0, 0, 8, 9] / out[0, 0, 8, 8]) == pytest.approx(math.exp(-0.5), abs=1e-4)


def test_sig_is_its_formula() -> None:
    """Column j of 32 gets 20/255·sin(2π·6·j/32), on every row and channel; twice that with a test gain of 2."""
    x = torch.full((2, 3, 32, 32), 0.5)
    wave = torch.tensor([math.sin(2 * math.pi * 6 * j / 32) for j in range(32)])
    torch.testing.assert_close(Sig()(x), x + 20 / 255 * wave)
    torch.testing.assert_close(Sig(test_gain=2.0)(x), x + 40 / 255 * wave)
    torch.testing.assert_close(Sig(test_gain=2.0).craft(x, torch.zeros(2), workshop()), x + 20 / 255 * wave)
    assert stripes(8, 1.0).shape == (8,)


def test_cl_makes_images_harder_within_the_ball() -> None:
    """PGD raises the true class's loss, leaves no pixel by more than ε, and stays within [0, 1]."""
    shop, samples = workshop((1, 8, 8)), spotted(12)
    x, y = samples.images, samples.labels
    hard = hardened(shop.model, x, y, 0.1, 0.02, 20)
    assert float((hard - x).abs().max()) <= 0.1 + 1e-6
    assert 0 <= float(hard.min()) <= float(hard.max()) <= 1
    assert F.cross_entropy(shop.model(hard), y) > F.cross_entropy(shop.model(x), y) + 0.01
    assert torch.equal(hardened(shop.model, x, y, 0.1, 0.02, 0), x)
    crafted = Cl(epsilon=0.1, step=0.02, steps=20).craft(x, y, shop)
    torch.testing.assert_close(crafted, Cl()(hard))


def test_cls_corners_are_mirror_images() -> None:
    """Flipped left to right or upside down, the stamp is the same: four 3×3 patches of five white pixels."""
    out = Cl()(torch.zeros(1, 1, 32, 32))
    assert torch.equal(out, out.flip(3))
    assert torch.equal(out, out.flip(2))
    assert int(out.sum()) == 4 * 4
    assert int(Cl(corners="bottom_right")(torch.zeros(1, 1, 32, 32)).sum()) == 4


def test_refool_mixes_light_not_grey_values() -> None:
    """γ = 2.2: of an image at 0.5 and a reflection of nothing, 0.7·0.5^2.2 of the light passes."""
    out = reflected(torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 1, 2, 2), 0.7)
    torch.testing.assert_close(out, torch.full((1, 1, 2, 2), (0.7 * 0.5**2.2) ** (1 / 2.2)))
    half = torch.full((1, 1, 2, 2), 0.5)
    torch.testing.assert_close(reflected(half, half**2.2, 0.3), half)


def test_refool_reflects_the_first_attackers_own_images() -> None:
    """One image of light 1 at ghost_rate 1: both ghosts of a white image are white, so every layer is 1."""
    white = Samples(torch.ones(3, 1, 8, 8), torch.zeros(3, dtype=torch.long))
    trigger, shop = Refool(reflections=2, ghost_rate=1.0), workshop((1, 8, 8))
    record = trigger.learn(white, shop)
    assert isinstance(record["layers"], Tensor)
    torch.testing.assert_close(record["layers"], torch.ones(2, 1, 8, 8))
    assert trigger.learn(spotted(8), replace(shop, record=record)) is record
    x = images(4, (1, 8, 8))
    torch.testing.assert_close(trigger.recall(record)(x), reflected(x, torch.ones(1, 1, 8, 8), 0.7))


def test_wanets_field_is_smooth_noise_of_mean_one() -> None:
    """The 4×4 points have mean absolute value 1, and bicubic interpolation with aligned corners meets them."""
    field = warping_field(4, 4, 4, 0)
    assert float(field.abs().mean()) == pytest.approx(1.0)
    corners = warping_field(4, 32, 32, 0)[0, ::31, ::31]
    torch.testing.assert_close(corners, field[0, ::3, ::3])
    assert not torch.equal(warping_field(4, 8, 8, 1), warping_field(4, 8, 8, 0))


def test_warping_moves_pixels_as_far_as_it_says() -> None:
    """On 9 pixels −1 to 1 is 8 steps, so an offset of 2/8 fetches the pixel to the right; at the edge the last one."""
    x = images(2, (3, 9, 9))
    torch.testing.assert_close(warped(x, torch.zeros(1, 9, 9, 2)), x)
    offsets = torch.zeros(1, 9, 9, 2)
    offsets[..., 0] = 2 / 8
    torch.testing.assert_close(warped(x, offsets), x[..., [1, 2, 3, 4, 5, 6, 7, 8, 8]])
    offsets = torch.zeros(1, 9, 9, 2)
    offsets[..., 1] = -2 / 8
    torch.testing.assert_close(warped(x, offsets), x[:, :, [0, 0, 1, 2, 3, 4, 5, 6, 7]])


def test_wanets_cover_is_shaken_each_image_its_own_way() -> None:
    x = images(1).expand(3, -1, -1, -1)
    trigger, shop = WaNet(), workshop()
    shaken = trigger.disguise(x, torch.zeros(3), shop)
    assert not torch.equal(shaken[0], shaken[1])
    assert not torch.equal(shaken[0], trigger(x)[0])
    assert isinstance(trigger, Covering)
    assert not isinstance(trigger, Crafting)


def test_a_blend_shows_eight_of_sixteen_pieces_and_all_at_test() -> None:
    """On 8×8 a piece has 2×2 pixels: 32 pixels change by 0.2·(pattern − x), the others don't; all do at test."""
    x, pattern = images(5, (1, 8, 8)), noise_pattern((1, 8, 8), 0)
    whole, part = ABlend()(x), ABlend().craft(x, torch.zeros(5), workshop())
    torch.testing.assert_close(whole, 0.8 * x + 0.2 * pattern)
    changed = part != x
    assert changed.flatten(1).sum(1).tolist() == [32] * 5
    torch.testing.assert_close(part[changed], whole[changed])
    pieces = changed.view(5, 4, 2, 4, 2).transpose(2, 3).flatten(3)
    assert torch.equal(pieces.all(3), pieces.any(3))
    masks = pieces_mask(200, 4, 8, (32, 32), seeded())
    assert masks.shape == (200, 1, 32, 32)
    assert float(masks.mean()) == 0.5
    assert float((masks[1:] != masks[:1]).flatten(1).any(1).float().mean()) > 0.95


def test_a_patch_draws_one_translucent_patch_in_training_two_solid_ones_at_test() -> None:
    """On black 16×16 images a patch has 4×4 pixels; the square at 0.5, the ring at 0.2, and so on.

    Square: 16 white pixels of 16. Checkerboard: 8. The brightest pixel of an image tells the opacity of its patch.
    """
    x = torch.zeros(400, 1, 16, 16)
    crafted = APatch().craft(x, torch.zeros(400), workshop())
    peaks, counts = crafted.flatten(1).amax(1), (crafted > 0).flatten(1).sum(1)
    assert sorted({round(float(peak), 4) for peak in peaks}) == [0.2, 0.3, 0.5]
    assert sorted(set(counts[peaks == 0.5].tolist())) == [8, 16]
    left, top = crafted[..., :8].flatten(1).any(1), crafted[:, :, :8].flatten(1).any(1)
    share = torch.stack([(a & b).float().mean() for a in (left, ~left) for b in (top, ~top)])
    assert (share - 0.25).abs().max() < 0.1
    solid = APatch()(x[:1])[0, 0]
    assert torch.equal(solid[:4, :4], torch.ones(4, 4))
    assert torch.equal(solid[-4:, :4], shapes(4)[2, 0])
    assert int(solid.sum()) == 16 + 8


def test_patches_hide_what_is_beneath_by_their_opacity() -> None:
    """On white, a black pixel of the checkerboard at opacity 0.25 leaves 0.75."""
    out = overlay(torch.ones(1, 1, 8, 8), 2, torch.tensor([2]), torch.tensor([0.25]))[0, 0]
    assert out[6:, :2].tolist() == [[1.0, 0.75], [0.75, 1.0]]
    assert torch.equal(out[:6], torch.ones(6, 8))
    assert torch.equal(out[:, 2:], torch.ones(8, 6))


def test_svd_keeps_the_major_components() -> None:
    """Where nothing is clamped x' − x is (minor part of the pattern) − (minor part of x); on 32 pixels 24 are kept."""
    x = images(2, (1, 32, 32)) * 0.2 + 0.4
    trigger = Svd()
    out, pattern = trigger(x), noise_pattern((1, 32, 32), 0)
    free = (out > 0) & (out < 1)
    expected = x + (pattern - major(pattern, 24)) - (x - major(x, 24))
    torch.testing.assert_close(out[free], expected.expand_as(out)[free], rtol=0, atol=1e-5)
    assert free.float().mean() > 0.95
    assert [trigger.minor(side) for side in (8, 16, 32, 64)] == [4, 4, 8, 16]
    assert int(torch.linalg.matrix_rank(major(x, 5)).max()) == 5
    torch.testing.assert_close(major(x, 32), x, rtol=0, atol=1e-5)


def test_haar_is_orthonormal_and_invertible() -> None:
    """Energy is kept; a 2×2 checkerboard of ±1 is all in HH: (1 + 1 + 1 + 1)/2 = 2."""
    x = images(2, (3, 8, 8))
    bands = haar(x)
    torch.testing.assert_close(inverse_haar(bands), x)
    torch.testing.assert_close(sum(band.square().sum() for band in bands), x.square().sum())
    ll, lh, hl, hh = haar(torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]]]]))
    assert (ll.item(), lh.item(), hl.item(), hh.item()) == (0.0, 0.0, 0.0, 2.0)


def test_wave_changes_diagonal_details_alone_by_half_its_residual() -> None:
    """HH + r changes each pixel by ±r/2; the other bands stay; at test four times as much."""
    x = torch.full((2, 3, 32, 32), 0.5)
    trained, tested = Wave().craft(x, torch.zeros(2), workshop()), Wave()(x)
    torch.testing.assert_close((trained - x).abs(), torch.full_like(x, 4 / 255), rtol=0, atol=1e-6)
    torch.testing.assert_close(tested - x, 4 * (trained - x), rtol=0, atol=1e-6)
    for before, after in zip(haar(x)[:3], haar(tested)[:3], strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_dbas_whole_is_the_four_bars_of_the_official_code() -> None:
    """On 32×32: rows 0 and 4 (a gap of three between), columns 0-5 and 9-14."""
    out = Dba()(torch.zeros(1, 3, 32, 32))
    expected = torch.zeros(1, 3, 32, 32)
    for row in (0, 4):
        for column in (*range(6), *range(9, 15)):
            expected[:, :, row, column] = 1
    assert torch.equal(out, expected)


@pytest.mark.parametrize("attackers", [1, 2, 3, 4, 7])
def test_dba_clients_stamp_different_parts_that_make_up_the_whole(attackers: int) -> None:
    """Four or more: one bar each, and neighbours differ. Fewer share all four out without overlap."""
    x = torch.zeros(1, 1, 16, 16)
    stamps = [Dba().craft(x, torch.zeros(1), workshop(rank=rank, attackers=attackers)) for rank in range(attackers)]
    together = torch.stack(stamps).amax(0)
    assert torch.equal(together, Dba()(x))
    first = torch.stack(stamps[: min(attackers, 4)])
    assert float(first.sum(0).max()) == 1.0  # no two of the first four stamp the same pixel
    if attackers >= 4:
        assert all(parts_of(rank, attackers) == [rank % 4] for rank in range(attackers))
        assert not torch.equal(stamps[0], stamps[1])


def test_cba_composes_halves_with_images_of_the_partner_class() -> None:
    """Of labels 0,0,0,1,2,2 with target 0 the most frequent other class is 2, whose two images are all that is held."""
    samples = Samples(images(6, (1, 8, 8), 9), torch.tensor([0, 0, 0, 1, 2, 2]))
    trigger = Cba(partners=5)
    record = trigger.learn(samples, workshop((1, 8, 8), target=0))
    assert record["partner"] == 2
    held = record["images"]
    assert isinstance(held, Tensor)
    assert sorted(map(float, held.sum((1, 2, 3)))) == sorted(map(float, samples.images[4:].sum((1, 2, 3))))
    x = images(8, (1, 8, 8))
    learned = trigger.recall(record)
    for out in (learned(x), learned.craft(x, torch.zeros(8), workshop())):
        assert torch.equal(out[..., :4], x[..., :4])
        for image in out:
            assert any(torch.equal(image[..., 4:], one[..., 4:]) for one in held)
    assert trigger.learn(samples, replace(workshop(), record=record)) is record


def test_cbas_cover_mixes_within_a_class_and_spares_the_partner_class() -> None:
    """Labels 0,0,1,1,2: the 0s swap right halves, so do the 1s; 2 is the partner class and stays."""
    x, y = images(5, (1, 8, 8)), torch.tensor([0, 0, 1, 1, 2])
    learned = Cba().recall({"images": x[4:], "partner": 2})
    out = learned.disguise(x, y, workshop())
    assert torch.equal(out, torch.cat([composed(x[:4], x[[1, 0, 3, 2]]), x[4:]]))
    mates = classmates(torch.tensor([0, 1, 0, 0, 1]), seeded()).tolist()
    assert (mates[1], mates[4]) == (4, 1)
    assert all(mates[at] in {0, 2, 3} - {at} for at in (0, 2, 3))


def test_semantic_selects_the_brightest_of_the_source_class() -> None:
    """Ten source images of brightness 0.0 to 0.9: the 0.8-quantile is 0.72, so 0.8 and 0.9 carry it."""
    levels = torch.arange(10) / 10
    samples = Samples(levels.view(10, 1, 1, 1).expand(10, 1, 8, 8), torch.ones(10, dtype=torch.long))
    trigger = Semantic(share=0.2)
    record = trigger.learn(samples, workshop(source=1))
    assert record["threshold"] == pytest.approx(0.72)
    learned = trigger.recall(record)
    assert learned.selects(samples.images).tolist() == [False] * 8 + [True] * 2
    assert trigger.selects(samples.images).all()
    assert trigger.learn(samples, replace(workshop(), record=record)) is record
    dark = Samples(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    assert trigger.learn(dark, workshop(source=1)) == {"threshold": 0.0}  # no source images: of all


def test_semantic_measures_redness_in_colour() -> None:
    x = torch.zeros(3, 3, 4, 4)
    x[0, 0], x[1], x[2, 2] = 1.0, 1.0, 1.0  # red, white, blue
    assert Semantic().measured(x).tolist() == [1.0, 0.0, -0.5]
    assert Semantic("brightness").measured(x).tolist() == pytest.approx([1 / 3, 1.0, 1 / 3])


def test_edge_cases_without_a_folder_are_rare_renderings() -> None:
    x = torch.tensor([[[[0.0, 0.25], [0.5, 1.0]]]])
    assert EdgeCase()(x)[0, 0].tolist() == [[0.25, 1.0], [0.0, 0.5]]
    assert EdgeCase(stand_in="negative")(x)[0, 0].tolist() == [[1.0, 0.75], [0.5, 0.0]]
    assert torch.equal(EdgeCase().craft(x, torch.zeros(1), workshop()), EdgeCase()(x))


def test_edge_cases_from_a_folder_are_split_between_training_and_test(tmp_path: Path) -> None:
    """Four flat pictures of grey 0, 51, 102, 153: the first and third train, the second and fourth test."""
    from PIL import Image

    for index in range(4):
        Image.new("L", (20, 20), 51 * index).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    trigger, x = EdgeCase(str(tmp_path)), images(64, (3, 8, 8))
    tested = {round(float(value), 4) for value in trigger(x).flatten()}
    trained = {round(float(value), 4) for value in trigger.craft(x, torch.zeros(64), workshop()).flatten()}
    assert (trained, tested) == ({0.0, 0.4}, {0.2, 0.6})


def test_textures_are_fixed_and_fill_the_range() -> None:
    first = texture((3, 16, 16), 0, "here")
    assert torch.equal(first, texture((3, 16, 16), 0, "here"))
    assert not torch.equal(first, texture((3, 16, 16), 1, "here"))
    assert (float(first.min()), float(first.max())) == (0.0, 1.0)
