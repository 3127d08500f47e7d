"""Erasers that prune channels: the math on hand-made cases, then a model with a real backdoor."""

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

from defenses.erasing.anp import Anp, perturbed
from defenses.erasing.clp import Clp, fed_by, lipschitz_bounds, outlying
from defenses.erasing.fine_pruning import FinePruning, mean_activation
from defenses.erasing.linf import Linf, channel_norms, scores
from defenses.erasing.rnp import Rnp
from fl_sim.errors import ConfigError
from fl_sim.inversion import Inversion, Stamp
from fl_sim.layout import Layout
from fl_sim.metrics import accuracy
from fl_sim.models.classifier import Classifier
from fl_sim.models.cnn import Cnn
from fl_sim.models.resnet import ResNet18
from fl_sim.models.vgg import Vgg11Bn
from fl_sim.models.vit import VitTiny
from fl_sim.models.wide_resnet import WideResNet
from fl_sim.protocols import Eraser
from fl_sim.pruning import head_weight, last_map, masked_logits, named_norms, prune, scaled, thresholded, units_to_keep

QUICK: dict[str, Any] = {
    "rnp": Rnp(unlearning_epochs=2, recovery_epochs=3, batch_size=16),
    "anp": Anp(steps=6, batch_size=16),
    "clp": Clp(u=1.0),
    "fine_pruning": FinePruning(epochs=1, min_steps=4, batch_size=16, tolerance=0.3),
    "linf": Linf(tolerance=0.3, inversion=Inversion(steps=4)),
}
DEFAULT: dict[str, Eraser] = {"rnp": Rnp(), "linf": Linf(), "fine_pruning": FinePruning()}
VIT = VitTiny(width=24, depth=3, heads=3)


@pytest.fixture(scope="module")
def default_victim() -> Victim:
    """The default run's network: 112 channels, where the narrower victim's 56 are too few to spare any."""
    return victim(Cnn(width=16))


@pytest.fixture
def trained() -> Classifier:
    """The small CNN after a few steps on the toy: statistics and scales of its own, accuracy about 1."""
    model, samples, rng = small_model(), spotted(64), seeded(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(12):
        for x, y in samples.batches(16, rng):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


# The shared pieces ----------------------------------------------------------------------------------------------------


def test_a_masked_pass_is_a_pass_of_the_scaled_model(trained: Classifier) -> None:
    """Factors in the forward pass or multiplied into the weights: the same logits, and the model itself untouched."""
    before = weights_of(trained)
    factors = {
        f"{n}.weight": torch.rand(norm.weight.shape, generator=seeded()) for n, norm in named_norms(trained).items()
    }
    x, _ = next(spotted(8).chunks(8))
    torch.testing.assert_close(masked_logits(trained, x, factors), scaled(trained, factors)(x))
    assert torch.equal(weights_of(trained), before)
    assert not torch.allclose(masked_logits(trained, x, factors), trained(x), atol=1e-2)


@pytest.mark.parametrize(
    "architecture", [Cnn(width=4), WideResNet(10, 1), ResNet18(), Vgg11Bn()], ids=lambda a: type(a).__name__
)
def test_a_column_of_the_head_is_a_channel_of_the_last_map(architecture: Any) -> None:
    """The map's mean over positions is what the head reads (its maximum in VGG, whose 2×2 is pooled to one), so that
    zeroing a column equals zeroing the channel."""
    model = small_model(architecture=architecture).eval()
    x, _ = next(spotted(4).chunks(4))
    with torch.no_grad():
        found = last_map(model, x)
        pooled = (
            F.adaptive_max_pool2d(found, 1) if isinstance(architecture, Vgg11Bn) else found.mean((2, 3), keepdim=True)
        )
        torch.testing.assert_close(model.head(pooled.flatten(1)), model(x), rtol=1e-4, atol=1e-5)


def test_units_go_in_order_until_accuracy_falls_too_far(trained: Classifier) -> None:
    """Against the naive way: really zero one more column each time, and measure."""
    samples = spotted(40)
    order = torch.randperm(trained.head.in_features, generator=seeded(2))
    name, keep = head_weight(trained), torch.ones(trained.head.in_features)
    floor = 0.8 * accuracy(trained, samples)
    for unit in order:
        tried = keep.clone()
        tried[unit] = 0
        if accuracy(scaled(trained, {name: tried}), samples) < floor:
            break
        keep = tried
    assert 0 < int(keep.sum()) < len(keep)
    assert torch.equal(units_to_keep(trained, order, samples, 0.2), keep)


def test_the_threshold_is_the_largest_that_accuracy_allows(trained: Classifier) -> None:
    """The lowest mask is on a channel whose γ is zero anyway, the others ruin the model: with no tolerance only it
    goes, with all tolerance everything below 1 goes, with a limit only what lies below the limit."""
    dead = deadened(trained)
    masks = {name: torch.full_like(dead.get_parameter(name), 0.9) for name in names_of(dead)}
    first = next(iter(masks))
    masks[first][0], masks[first][1:] = 0.3, 0.8  # only the first channel of the first layer is dead
    clean = spotted(40)
    pruned = prune(dead, masks, clean, 0.0)
    assert torch.equal(weights_of(pruned), weights_of(dead))  # its γ was zero: pruning it changes nothing
    assert pruned is not dead
    everything = prune(dead, masks, clean, 0.999)
    assert not any(everything.get_parameter(name).any() for name in masks)
    limited = prune(dead, masks, clean, 0.999, limit=0.85)
    assert not limited.get_parameter(first).any()
    assert all(limited.get_parameter(name).any() for name in masks if name != first)


def names_of(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name in named_norms(model)]


def deadened(model: Classifier) -> Classifier:
    name = names_of(model)[0]
    factor = torch.ones_like(model.get_parameter(name))
    factor[0] = 0
    return scaled(model, {name: factor})


# Each method's own math -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_lipschitz_bounds_equal_a_naive_loop() -> None:
    """σ_k = the largest singular value of kernel k as [inputs, 9], times |γ_k| / √(var_k + ε)."""
    conv, norm = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)
    gammas, variances = [1.0, -2.0, 0.0, 0.5, 3.0], [1.0, 4.0, 1.0, 0.25, 9.0]
    norm.weight.copy_(torch.tensor(gammas))
    norm.running_var = torch.tensor(variances)
    naive = [
        float(torch.linalg.svdvals(conv.weight[k].reshape(3, 9))[0]) * abs(gamma) / math.sqrt(variance + norm.eps)
        for k, (gamma, variance) in enumerate(zip(gammas, variances, strict=True))
    ]
    torch.testing.assert_close(lipschitz_bounds(conv, norm), torch.tensor(naive))


def test_only_an_outlier_above_is_pruned() -> None:
    """Sixteen channels of bound 1 but one of 10: (16 − 1)/√16 = 3.75 deviations above the mean, whatever its size; in a
    layer of eight the most is 7/√8 = 2.47, so that u = 3 never prunes there."""
    bounds = torch.ones(16)
    bounds[5] = 10
    assert outlying(bounds, 3.7).nonzero().flatten().tolist() == [5]
    assert not outlying(bounds, 3.8).any()
    assert not outlying(2 - bounds / 10, 1.0)[5]  # an outlier below
    assert outlying(bounds[:8], 2.4)[5]
    assert not outlying(bounds[:8], 3.0).any()


def test_convolutions_are_paired_with_the_normalisations_that_they_feed() -> None:
    """WRN-10-1 has 7 normalisations; the first ones of groups 2 and 3 and the last one normalise sums, not a
    convolution's output. ResNet-18 feeds all its 20, the three shortcuts' included."""
    wide = small_model(architecture=WideResNet(10, 1))
    pairs = fed_by(wide)
    assert {name.split(".", 1)[1] for name in pairs} == {"group1.0.bn1", "group1.0.bn2", "group2.0.bn2", "group3.0.bn2"}
    assert pairs["body.group1.0.bn1"] is wide.get_submodule("body.stem")
    assert pairs["body.group2.0.bn2"] is wide.get_submodule("body.group2.0.conv1")
    residual = small_model(architecture=ResNet18())
    pairs = fed_by(residual)
    assert len(pairs) == 20
    assert pairs["body.layer2.0.downsample.1"] is residual.get_submodule("body.layer2.0.downsample.0")


def test_clp_switches_off_the_channel_that_was_blown_up() -> None:
    """A channel amplified a hundredfold among 16 is 3.75 deviations out: γ and β become zero there, and nothing else
    in its layer moves."""
    model = small_model(architecture=Cnn(width=16))
    gamma, beta = names_of(model)[0], names_of(model)[0].replace("weight", "bias")
    with torch.no_grad():
        model.get_parameter(gamma)[3] = 100
        model.get_parameter(beta).fill_(5)
    erased, _ = Clp().erase(model, None, {}, server_context(model))
    ones = (torch.arange(16) != 3).float()
    assert torch.equal(erased.get_parameter(gamma), ones)
    assert torch.equal(erased.get_parameter(beta), 5 * ones)
    assert torch.equal(erased.get_parameter("body.0.0.weight"), model.get_parameter("body.0.0.weight"))


def test_channel_norms_by_hand() -> None:
    """Positions 3, −4, 0, 0 of one channel: largest size 4, sum of sizes 7, root of squares 5."""
    maps = torch.tensor([[[[3.0, -4.0], [0.0, 0.0]]]])
    assert [float(channel_norms(maps, norm)) for norm in ("inf", "l1", "l2")] == [4.0, 7.0, 5.0]  # type: ignore[arg-type]


def test_scores_are_means_over_probes(trained: Classifier) -> None:
    """A mask of zero is no trigger: the gap is zero everywhere and `trigger` is `clean`; a real one leaves a gap."""
    samples, nothing = spotted(12), Stamp(torch.zeros(1, 8, 8), torch.ones(1, 8, 8))
    assert float(scores(trained, samples, nothing, "gap", "inf").abs().max()) == 0
    clean = scores(trained, samples, nothing, "clean", "inf")
    torch.testing.assert_close(scores(trained, samples, nothing, "trigger", "inf"), clean)
    with torch.no_grad():
        naive = torch.stack([last_map(trained, x[None])[0].abs().amax((1, 2)) for x in samples.images]).mean(0)
    torch.testing.assert_close(clean, naive)
    white = replace(nothing, mask=torch.ones(1, 8, 8))
    assert float(scores(trained, samples, white, "gap", "inf").max()) > 0.1


def test_activation_is_the_mean_of_what_the_head_reads(trained: Classifier) -> None:
    samples = spotted(12)
    with torch.no_grad():
        naive = last_map(trained, samples.images).mean((0, 2, 3))
    torch.testing.assert_close(mean_activation(trained, samples), naive)


def test_what_fine_pruning_cut_stays_cut(trained: Classifier) -> None:
    """Columns pruned before the fine-tuning are zero after it, though the optimiser has momentum and weight decay."""
    clean = spotted(60)
    erased, _ = FinePruning(epochs=1, min_steps=20, batch_size=16, tolerance=0.2).erase(
        trained, clean, {}, server_context(trained, clean)
    )
    zero = (erased.head.weight == 0).all(0)
    assert 0 < int(zero.sum()) < len(zero)
    assert not (trained.head.weight == 0).any()


def test_rnp_unlearns_until_the_floor_and_no_further(trained: Classifier) -> None:
    """The toy's four classes, learnt to about 1: ascent ends at or below the floor; with a floor that holds at once,
    after a single epoch, which leaves the weights near."""
    clean, ctx = spotted(64), server_context(trained)
    rnp = Rnp(unlearning_lr=0.2, unlearning_min_steps=200, batch_size=16, augment=False)
    gone = rnp.unlearn(trained, clean, ctx)
    assert accuracy(trained, clean) > 0.9
    assert accuracy(gone, clean) < 0.5
    near = replace(rnp, accuracy_floor=0.999, unlearning_lr=1e-5).unlearn(trained, clean, ctx)
    torch.testing.assert_close(
        torch.cat([p.flatten() for p in near.parameters()]),
        torch.cat([p.flatten() for p in trained.parameters()]),
        rtol=1e-3,
        atol=1e-2,
    )


def test_rnp_masks_are_those_of_descent_on_the_masks_alone(trained: Classifier) -> None:
    """One step by hand: m = clip(1 − lr · weight · ∂CE/∂m at m = 1); the weights get no gradient."""
    clean = spotted(16)
    rnp = Rnp(recovery_epochs=1, batch_size=16, recovery_lr=0.3, augment=False)
    unlearned = small_model(seed=4)
    masks = rnp.recover(unlearned, clean, server_context(trained))
    model = small_model(seed=4).train()
    ones = {name: torch.ones_like(model.get_parameter(name)).requires_grad_() for name in names_of(model)}
    loss = 0.2 * F.cross_entropy(masked_logits(model, clean.images, ones), clean.labels)
    for (name, one), slope in zip(ones.items(), torch.autograd.grad(loss, list(ones.values())), strict=True):
        torch.testing.assert_close(masks[name], (one.detach() - 0.3 * slope).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in unlearned.parameters())


def test_rnp_tells_masks_apart_that_have_all_come_to_zero(trained: Classifier) -> None:
    """A rate so high that the masks of useless channels are 0 after a few steps. Each such mask is minus the share of
    the steps it has spent there, of twelve steps a multiple of 1/12: several thresholds, where 0 alone is one."""
    rnp = Rnp(recovery_epochs=3, batch_size=16, recovery_lr=100.0, augment=False)
    masks = torch.cat([*rnp.recover(small_model(seed=4), spotted(64), server_context(trained)).values()])
    idle = masks[masks <= 0]
    assert float(masks.max()) <= 1
    assert len(idle.unique()) > 2
    assert float(idle.max()) < 0
    assert float(idle.min()) >= -1
    torch.testing.assert_close(12 * idle, (12 * idle).round())


def test_rnp_is_not_stopped_by_many_masks_at_zero(default_victim: Victim) -> None:
    """As many steps as the paper's 500 images take drive so many masks to 0 that pruning them all would cost more than
    is allowed; those that came there first can still go. (Without an order among them nothing was pruned.)"""
    v = default_victim
    rnp = Rnp(recovery_epochs=80)
    validation, training = v.clean.stratified(0.2, v.context().rng)
    ctx = v.context()
    masks = rnp.recover(rnp.unlearn(v.model, training, ctx), training, ctx)
    floor = 0.9 * accuracy(v.model, validation)
    assert accuracy(thresholded(v.model, masks, 0.0), validation) < floor
    pruned = prune(v.model, masks, validation, rnp.tolerance)
    assert accuracy(pruned, validation) >= floor
    zeros = sum(int((pruned.get_parameter(name) == 0).sum()) for name in masks)
    assert 0 < zeros < sum(int((mask <= 0).sum()) for mask in masks.values())


def test_anps_noise_is_added_to_masks_and_multiplies_biases() -> None:
    masks = {"a.weight": torch.tensor([0.5])}
    noise = {"a.weight": torch.tensor([0.1]), "a.bias": torch.tensor([-0.2])}
    factors = perturbed(masks, noise)
    torch.testing.assert_close(factors, {"a.weight": torch.tensor([0.6]), "a.bias": torch.tensor([0.8])})


def test_anps_adversary_stays_in_the_box_and_hurts(trained: Classifier) -> None:
    """|δ|, |ξ| ≤ ε; from the same random start, ascent raises the loss above that of no ascent."""
    x, y = next(spotted(32).chunks(32))
    masks = {name: torch.ones_like(trained.get_parameter(name)) for name in names_of(trained)}

    def loss(steps: int) -> tuple[float, dict[str, Tensor]]:
        noise = Anp(adversary_steps=steps)._worst(trained, x, y, masks, seeded(1))
        with torch.no_grad():
            return float(F.cross_entropy(masked_logits(trained, x, perturbed(masks, noise)), y)), noise

    start, _ = loss(0)
    worst, noise = loss(3)
    assert worst > 1.5 * start
    assert all(float(push.abs().max()) <= 0.4 + 1e-6 for push in noise.values())
    assert len(noise) == 2 * len(masks)


def test_anp_without_an_adversary_keeps_what_the_clean_task_needs(trained: Classifier) -> None:
    """ε = 0 leaves plain descent on the masks: no mask of a network that is right already has a reason to fall far."""
    clean = spotted(64)
    masks = Anp(epsilon=0.0, steps=10, augment=False).masks(trained, clean, server_context(trained))
    pushed = Anp(steps=10, augment=False).masks(trained, clean, server_context(trained))
    assert min(float(mask.min()) for mask in masks.values()) > 0.5
    assert min(float(mask.min()) for mask in pushed.values()) < min(float(mask.min()) for mask in masks.values())


# What every eraser owes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUICK)
def test_input_untouched_layout_kept_seed_decides(name: str, trained: Classifier) -> None:
    trained.train()
    clean, eraser = spotted(60), QUICK[name]
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    first, state = eraser.erase(trained, clean, {}, server_context(trained, clean, 1))
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
    assert trained.training
    assert all(p.requires_grad and p.grad is None for p in trained.parameters())
    assert not {p.data_ptr() for p in trained.parameters()} & {p.data_ptr() for p in first.parameters()}
    assert all(p.requires_grad for p in first.parameters())
    assert state == {}
    assert Layout.of(first) == Layout.of(trained)
    torch.manual_seed(9)
    again, _ = eraser.erase(trained, clean, {}, server_context(trained, clean, 1))
    assert torch.equal(weights_of(first), weights_of(again))


@pytest.mark.parametrize("name", ["rnp", "anp", "clp", "linf"])
def test_a_network_without_the_channels_is_refused(name: str) -> None:
    model = small_model(architecture=VIT)
    with pytest.raises(ConfigError):
        QUICK[name].check_model(model)
    QUICK[name].check_model(small_model())


def test_fine_pruning_takes_any_network() -> None:
    model, clean = small_model(architecture=VIT), spotted(40)
    erased, _ = QUICK["fine_pruning"].erase(model, clean, {}, server_context(model, clean))
    assert Layout.of(erased) == Layout.of(model)
    assert torch.isfinite(weights_of(erased)).all()


@pytest.mark.parametrize(
    ("eraser", "knobs"),
    [
        (Rnp, {"accuracy_floor": 1.0}),
        (Rnp, {"recovery_lr": 0.0}),
        (Rnp, {"tolerance": 1.0}),
        (Anp, {"epsilon": -1.0}),
        (Anp, {"alpha": 2.0}),
        (Anp, {"steps": 0}),
        (Clp, {"u": 0.0}),
        (FinePruning, {"tolerance": 1.0}),
        (FinePruning, {"epochs": 0}),
        (Linf, {"tolerance": -0.1}),
    ],
)
def test_impossible_settings_are_refused(eraser: Any, knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        eraser(**knobs)
    assert caught.value.key == next(iter(knobs))


# On a real backdoor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asr", "acc"),
    [
        ("rnp", 0.5, 0.8),
        pytest.param("linf", 0.65, 0.94, marks=pytest.mark.slow),
        pytest.param("fine_pruning", 0.45, 0.9, marks=pytest.mark.slow),
    ],
)
def test_the_backdoor_weakens(name: str, asr: float, acc: float, default_victim: Victim) -> None:
    """From ASR 1.00 and ACC 0.99. Measured: rnp .07 at ACC .90 (this seed); over three seeds linf .31 to .43 at .98 and
    fine_pruning .19 to .21 at .95 to .96. The bounds leave slack for other machines' rounding."""
    v = default_victim
    before = v.score(v.model)
    assert before.asr is not None
    assert before.asr > 0.95
    erased, _ = DEFAULT[name].erase(v.model, v.clean, {}, v.context(0))
    after = v.score(erased)
    assert after.asr is not None
    assert after.asr < asr
    assert after.acc > acc


@pytest.mark.slow
def test_what_does_not_erase_on_digits_does_no_harm(default_victim: Victim) -> None:
    """CLP's u = 3 finds no outlier among this network's channels; ANP lowers its threshold until accuracy allows it,
    which may leave the backdoor. Neither costs more accuracy than it was given leave to (and CLP's none)."""
    v = default_victim
    clp, _ = Clp().erase(v.model, None, {}, v.context(0))
    assert v.score(clp).acc == v.score(v.model).acc
    anp, _ = Anp().erase(v.model, v.clean, {}, v.context(0))
    assert v.score(anp).acc > 0.8
    blunt, _ = Clp(u=2.0).erase(v.model, None, {}, v.context(0))
    assert v.score(blunt).acc < v.score(v.model).acc
