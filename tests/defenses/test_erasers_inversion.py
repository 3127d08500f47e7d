"""Erasers that look for the trigger: the math on hand-made cases, then a model with a real backdoor."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import seeded, server_context, small_model, spotted, weights_of
from victim import Victim, victim

from defenses.erasing.bna import Bna, corrected, correction, moments
from defenses.erasing.ibau import Ibau, implicit_gradient, within_ball
from defenses.erasing.mcl import Mcl, contrast, contrastive
from defenses.erasing.nc_unlearn import NcUnlearn, stamped_at_random
from fl_sim.errors import ConfigError
from fl_sim.inversion import Inversion, Stamp
from fl_sim.layout import Layout
from fl_sim.models.cnn import Cnn
from fl_sim.models.resnet import ResNet18
from fl_sim.models.vit import VitTiny
from fl_sim.models.wide_resnet import WideResNet
from fl_sim.protocols import Eraser
from fl_sim.pruning import named_norms
from fl_sim.training import cross_entropy

SHORT = Inversion(steps=6)
QUICK: dict[str, Eraser] = {
    "mcl": Mcl(epochs=1, min_steps=4, batch_size=16, inversion=SHORT),
    "nc_unlearn": NcUnlearn(min_steps=4, batch_size=16, inversion=SHORT),
    "bna": Bna(tolerance=0.9, inversion=SHORT),
    "ibau": Ibau(rounds=1, min_steps=0, batch_size=16),
}
VIT = VitTiny(width=24, depth=3, heads=3)


def corner(side: int = 8) -> Stamp:
    """White in the four upper left pixels."""
    mask = torch.zeros(1, side, side)
    mask[:, :2, :2] = 1
    return Stamp(mask, torch.ones(1, side, side))


# MCL ------------------------------------------------------------------------------------------------------------------


def test_contrast_by_hand() -> None:
    """Features along the clean ones and across the stamped ones: −log(e^{1/T}/(e^{1/T} + e⁰)) at T = 0.5; the other way
    round −log(e⁰/(e⁰ + e^{1/T})); lengths don't matter. The two averaged."""
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    near, far = -math.log(math.e**2 / (math.e**2 + 1)), -math.log(1 / (1 + math.e**2))
    assert float(contrast(a, a, b, 0.5)) == pytest.approx(near)
    assert float(contrast(a, b, a, 0.5)) == pytest.approx(far)
    both = contrast(torch.cat([a, a]), torch.cat([a, b]), torch.cat([b, a]), 0.5)
    assert float(both) == pytest.approx((near + far) / 2)


@torch.no_grad()
def test_mcl_adds_the_clean_images_cross_entropy() -> None:
    """At the start the student is the victim: f(x') = f₀(x'), so L is the contrast of s(f₀(x'), f₀(x)) with 1/T."""
    model = small_model().eval()
    x, y = next(spotted(16).chunks(16))
    alone = contrastive(model, corner(), 0.5, 0.0)(model, x, y)
    assert float(contrastive(model, corner(), 0.5, 2.0)(model, x, y)) == pytest.approx(
        float(alone) + 2 * float(cross_entropy(model, x, y)), rel=1e-5
    )
    assert math.log(2) < float(alone) < math.log(1 + math.e**4)  # equal cosines at best, −1 against 1 at worst
    nothing = replace(corner(), mask=torch.zeros(1, 8, 8))
    assert float(contrastive(model, nothing, 0.5, 0.0)(model, x, y)) == pytest.approx(math.log(2))


# Neural Cleanse's unlearning ------------------------------------------------------------------------------------------


def test_a_share_of_the_images_is_stamped() -> None:
    """Of 4,000 grey images a fifth are changed (± 4 standard deviations of 25), half of these by either stamp, and each
    changed one is exactly what its stamp makes of it."""
    x = torch.full((4000, 1, 8, 8), 0.5)
    stamps = [corner(), replace(corner(), pattern=torch.zeros(1, 8, 8))]
    stamped = stamped_at_random(x, stamps, 0.2, seeded())
    white, black = ((stamped == stamp(x)).flatten(1).all(1) for stamp in stamps)
    bare = (stamped == x).flatten(1).all(1)
    assert int(bare.sum() + white.sum() + black.sum()) == 4000
    assert 700 < int((~bare).sum()) < 900
    assert 320 < int(white.sum()) < 480
    assert torch.equal(stamped, stamped_at_random(x, stamps, 0.2, seeded()))


# BNA ------------------------------------------------------------------------------------------------------------------


def test_correction_by_hand() -> None:
    """Stamped 10 ± 4 onto clean 1 ± 2: z' = (z − 10)·2/4 + 1 = z/2 − 4. Where stamped images don't vary only the mean
    is moved: 5 ± 0 onto 2 ± 3 is z − 3."""
    clean = (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]))
    stamped = (torch.tensor([10.0, 5.0]), torch.tensor([4.0, 0.0]))
    scale, shift = correction(clean, stamped)
    torch.testing.assert_close(scale, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(shift, torch.tensor([-4.0, -3.0]))


@pytest.mark.parametrize("architecture", [Cnn(width=4), WideResNet(10, 1), ResNet18()], ids=lambda a: type(a).__name__)
def test_stamped_images_get_the_statistics_of_clean_ones(architecture: Any) -> None:
    """At full strength every normalisation's output has on stamped images the mean and deviation that the original has
    on clean ones, in networks with shortcuts too: each layer is measured after the earlier ones were corrected."""
    model = small_model(architecture=architecture).eval()
    clean = spotted(48).images
    stamped = corner()(clean)
    names = list(named_norms(model))
    wanted, before = moments(model, clean, names), moments(model, stamped, names)
    after = moments(corrected(model, clean, stamped), stamped, names)
    assert max(float((before[n][0] - wanted[n][0]).abs().max()) for n in names) > 0.05
    for name in names:
        varied = after[name][1] > 1e-2
        torch.testing.assert_close(after[name][0], wanted[name][0], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(after[name][1][varied], wanted[name][1][varied], rtol=2e-2, atol=1e-3)


def test_no_strength_and_no_trigger_change_nothing() -> None:
    model, clean = small_model().eval(), spotted(24).images
    assert torch.equal(weights_of(corrected(model, clean, corner()(clean), 0.0)), weights_of(model))
    torch.testing.assert_close(weights_of(corrected(model, clean, clean)), weights_of(model), rtol=1e-4, atol=1e-5)


def test_moments_are_those_of_the_whole_set() -> None:
    model, samples = small_model().eval(), spotted(24)
    name = next(iter(named_norms(model)))
    mean, deviation = moments(model, samples.images, [name])[name]
    with torch.no_grad():
        _, [z] = model.observe(samples.images, [name.removeprefix("body.")])
    torch.testing.assert_close(mean, z.mean((0, 2, 3)))
    torch.testing.assert_close(deviation, z.std((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)


# I-BAU ----------------------------------------------------------------------------------------------------------------


def test_the_implicit_gradient_of_a_quadratic() -> None:
    """inner = ½ a δ² − b θ δ has δ* = bθ/a, so with H = ½ δ*² the exact dH/dθ is δ*·b/a. Φ = δ − η(aδ − bθ), and K
    terms of the series Σ (1 − ηa)^k give (1 − (1 − ηa)^K) of it: with a = 2, b = 3, η = 0.25, K = 4: 15/16."""
    a, b, rate = 2.0, 3.0, 0.25
    theta = torch.tensor([0.7], requires_grad=True)
    delta = (b * theta / a).detach()

    def inner(d: Tensor) -> Tensor:
        return (0.5 * a * d * d - b * theta * d).sum()

    for terms, share in ((4, 15 / 16), (200, 1.0), (0, 0.0)):
        [found] = implicit_gradient(inner, delta.clone(), delta, [theta], rate=rate, terms=terms)
        assert float(found) == pytest.approx(share * float(delta) * b / a, rel=1e-5)


def test_the_objective_carries_the_whole_hypergradient() -> None:
    """Its value is the cross-entropy; its gradient that of the cross-entropy plus the implicit part, done apart."""
    model = small_model().eval()
    x, y = next(spotted(16).chunks(16))
    delta = 0.3 * torch.randn(1, 8, 8, generator=seeded())
    eraser, weights = Ibau(share=1.0), list(model.parameters())
    loss = eraser.unlearning(delta, model, x, y)
    total = torch.autograd.grad(loss, weights)
    d = delta.clone().requires_grad_()
    plain = F.cross_entropy(model(x + d), y)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    direct = torch.autograd.grad(plain, [d, *weights])
    implicit = implicit_gradient(
        lambda each: eraser.misleading(model, x, y, each),
        direct[0],
        delta,
        weights,
        rate=eraser.fixed_point_lr,
        terms=5,
    )
    assert max(float(part.abs().max()) for part in implicit) > 1e-4
    for found, first, second in zip(total, direct[1:], implicit, strict=True):
        torch.testing.assert_close(found, first + second, rtol=1e-3, atol=1e-5)


def test_only_a_share_of_a_batch_is_perturbed() -> None:
    """Of 16 images a quarter: the loss is that of 4 images with δ and 12 without."""
    model = small_model().eval()
    x, y = next(spotted(16).chunks(16))
    delta = torch.ones(1, 8, 8)
    loss = Ibau(share=0.25, terms=0).unlearning(delta, model, x, y)
    expected = F.cross_entropy(model(torch.cat([x[:4] + 1, x[4:]])), y)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))


def test_one_perturbation_misleads_on_all_images() -> None:
    """A backdoored model is easily misled: one perturbation of root mean square 0.18 makes nearly every image something
    else, and nearly all the same. (A single step does not: the ascent must go on where an epoch is too short.)"""
    v = victim()
    eraser = Ibau()
    delta = eraser.perturbation(v.model, v.clean, v.context())
    assert float(delta.square().mean().sqrt()) <= eraser.radius + 1e-6
    x, y = next(v.clean.chunks(200))
    with torch.no_grad():
        predicted = v.model(x + delta).argmax(1)
    assert float((predicted == y).float().mean()) < 0.5
    assert int(predicted.bincount().max()) > 0.6 * len(y)


def test_a_ball_by_hand() -> None:
    """Threes have the root mean square 3: halved by a radius of 1.5, left alone by one of 4."""
    threes = torch.full((2, 2), 3.0)
    torch.testing.assert_close(within_ball(threes, 1.5), threes / 2)
    assert torch.equal(within_ball(threes, 4.0), threes)


# What every eraser owes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUICK)
def test_input_untouched_layout_kept_seed_decides(name: str) -> None:
    model, clean, eraser = small_model().train(), spotted(60), QUICK[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, state = eraser.erase(model, clean, {}, server_context(model, clean, 1))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in first.parameters()}
    assert all(p.requires_grad for p in first.parameters())
    assert state == {}
    assert Layout.of(first) == Layout.of(model)
    torch.manual_seed(9)
    again, _ = eraser.erase(model, clean, {}, server_context(model, clean, 1))
    assert torch.equal(weights_of(first), weights_of(again))


@pytest.mark.parametrize("name", ["mcl", "nc_unlearn", "ibau"])
def test_a_vision_transformer_is_taken(name: str) -> None:
    """I-BAU needs second derivatives, which the fast kernels of attention lack."""
    model, clean = small_model(architecture=VIT), spotted(24)
    erased, _ = QUICK[name].erase(model, clean, {}, server_context(model, clean))
    assert torch.isfinite(weights_of(erased)).all()
    assert not torch.equal(weights_of(erased), weights_of(model))


def test_bna_refuses_a_model_without_batch_normalisation() -> None:
    with pytest.raises(ConfigError, match="batch-normalised"):
        Bna().check_model(small_model(architecture=VIT))
    Bna().check_model(nn.Sequential(nn.BatchNorm2d(3)))


@pytest.mark.parametrize(
    ("eraser", "knobs"),
    [
        (Mcl, {"temperature": 0.0}),
        (Mcl, {"cross_entropy": -1.0}),
        (NcUnlearn, {"share": 0.0}),
        (NcUnlearn, {"anomaly": 0.0}),
        (Bna, {"tolerance": 1.0}),
        (Ibau, {"share": 0.0}),
        (Ibau, {"terms": -1}),
        (Ibau, {"radius": 0.0}),
        (Ibau, {"rounds": 0}),
    ],
)
def test_impossible_settings_are_refused(eraser: Any, knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        eraser(**knobs)
    assert caught.value.key == next(iter(knobs))


# On a real backdoor ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default_victim() -> Victim:
    """The default run's network."""
    return victim(Cnn(width=16))


@pytest.mark.parametrize(
    ("eraser", "asr", "acc"),
    [
        pytest.param(NcUnlearn(), 0.1, 0.95, marks=pytest.mark.slow),
        pytest.param(Mcl(), 0.1, 0.9, marks=pytest.mark.slow),
        (Bna(), 0.5, 0.85),
        pytest.param(Ibau(), 0.8, 0.94, marks=pytest.mark.slow),
    ],
    ids=lambda v: type(v).__name__,
)
def test_the_backdoor_weakens(eraser: Eraser, asr: float, acc: float, default_victim: Victim) -> None:
    """From ASR 1.00 and ACC 0.99; measured over three seeds: nc_unlearn 0 to .01 at ACC .97 to .98, mcl 0 to .01 at .95
    to .96, bna .17 to .63 at .90 to .95 (seed 0, the one here, .17), over two ibau .45 to .55 at
    .98 to .99. The bounds leave slack for rounding."""
    v = default_victim
    before = v.score(v.model)
    assert before.asr is not None
    assert before.asr > 0.95
    erased, _ = eraser.erase(v.model, v.clean, {}, v.context(0))
    after = v.score(erased)
    assert after.asr is not None
    assert after.asr < asr
    assert after.acc > acc
