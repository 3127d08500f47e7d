"""The networks: sizes, taps, initialisation, precision."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from toys import seeded, small_model

from fl_sim.errors import ConfigError
from fl_sim.layout import Layout
from fl_sim.models.classifier import Architecture, Compute, build_classifier, reset_linear
from fl_sim.models.cnn import Cnn
from fl_sim.models.resnet import ResNet18
from fl_sim.models.wide_resnet import WideResNet

NETWORKS: list[tuple[Architecture, tuple[str, ...]]] = [
    (Cnn(), ("0", "1", "2")),
    (ResNet18(), ("layer1", "layer2", "layer3", "layer4")),
    (WideResNet(), ("group1", "group2", "group3")),
]
IDS = ["cnn", "resnet18", "wrn_16_1"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 16, 28, 32])
@pytest.mark.parametrize(("architecture", "names"), NETWORKS, ids=IDS)
def test_logits_and_taps(architecture: Architecture, names: tuple[str, ...], side: int, channels: int) -> None:
    """Taps halve from full resolution; a stride of 2 makes ⌈side/2⌉ of a side (28, 14, 7, 4), pooling ⌊side/2⌋.

    On 8×8 images ResNet-18's fourth group is 1×1 and no tap.
    """
    model = small_model(classes=7, shape=(channels, side, side), architecture=architecture).eval()
    x = torch.rand(2, channels, side, side, generator=seeded())
    with torch.no_grad():
        logits, taps = model.with_taps(x)
        assert torch.equal(logits, model(x))
    assert logits.shape == (2, 7)
    sides = {8: [8, 4, 2, 1], 16: [16, 8, 4, 2], 28: [28, 14, 7, 4], 32: [32, 16, 8, 4]}[side][: len(names)]
    expected = [each for each in sides if each >= 2]
    assert model.taps == names[: len(expected)]
    assert [tuple(tap.shape[2:]) for tap in taps] == [(each, each) for each in expected]


def test_wide_resnet_taps_have_16_32_64_channels_and_come_before_the_last_relu() -> None:
    model = small_model(shape=(3, 32, 32), architecture=WideResNet()).eval()
    with torch.no_grad():
        _, taps = model.with_taps(torch.rand(2, 3, 32, 32, generator=seeded()))
    assert [tap.shape[1] for tap in taps] == [16, 32, 64]
    assert float(taps[-1].min()) < 0


@pytest.mark.parametrize(
    ("architecture", "channels", "parameters"),
    [
        (ResNet18(), 3, 11_173_962),
        (ResNet18(), 1, 11_173_962 - 2 * 64 * 9),
        (WideResNet(16, 1), 3, 175_066),
        (WideResNet(40, 2), 3, 2_243_546),
        (Cnn(16), 1, 24_058),
    ],
)
def test_parameter_counts_at_ten_classes(architecture: Architecture, channels: int, parameters: int) -> None:
    """ResNet-18 with the CIFAR stem: 11,173,962 (kuangliu/pytorch-cifar).

    WRN-16-1: stem 3·16·9 = 432; group 1, twice 16→16: 2·(32 + 2304 + 32 + 2304) = 9,344; group 2, 16→32 with 1×1
    shortcut: 32 + 4608 + 64 + 9216 + 512 = 14,432 and 32→32: 2·(64 + 9216) = 18,560; group 3, 32→64:
    64 + 18432 + 128 + 36864 + 2048 = 57,536 and 64→64: 2·(128 + 36864) = 73,984; last BN 128; head 640 + 10.
    Sum 175,066. WRN-40-2: "2.2 M" in its paper's table, 2,243,546 by the same sum.
    CNN: convolutions 144 + 4608 + 18432, BNs 32 + 64 + 128, head 650.
    """
    model = small_model(classes=10, shape=(channels, 32, 32), architecture=architecture)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert Layout.of(model).parameters == parameters


@pytest.mark.parametrize(("architecture", "_names"), NETWORKS, ids=IDS)
def test_weights_depend_on_the_given_generator_only(architecture: Architecture, _names: tuple[str, ...]) -> None:
    def vector(seed: int, torch_seed: int) -> torch.Tensor:
        torch.manual_seed(torch_seed)
        model = small_model(seed, shape=(3, 8, 8), architecture=architecture)
        return Layout.of(model).read(model)

    assert torch.equal(vector(0, 1), vector(0, 2))
    assert not torch.equal(vector(0, 1), vector(1, 1))


def test_initial_scales() -> None:
    """He, fan out: 64 channels · 9 give a deviation √(2/576) = 0.0589; linear: uniform within ±1/√64 = 0.125."""
    model = small_model(classes=10, architecture=Cnn(16))
    convolution, head = model.body[2][1].weight, model.head
    assert convolution.std().item() == pytest.approx(0.0589, rel=0.03)
    for tensor in (head.weight, head.bias):
        assert tensor.abs().max().item() <= 0.125
    assert head.weight.std().item() == pytest.approx(0.125 / 3**0.5, rel=0.05)
    assert model.body[0][1].weight.unique().tolist() == [1.0]


def test_normalisation_is_the_first_layer() -> None:
    """(x − 0.5)/0.25 inside the model equals a model without normalisation on the normalised images."""
    model = small_model().eval()
    plain = build_classifier(Cnn(width=4), (1, 8, 8), 4, (0.0,), (1.0,), seeded(0)).eval()
    x = torch.rand(4, 1, 8, 8, generator=seeded())
    torch.testing.assert_close(model(x), plain((x - 0.5) / 0.25))
    assert not {"mean", "std"} & set(model.state_dict())


@pytest.mark.parametrize(("architecture", "_names"), NETWORKS, ids=IDS)
def test_taps_leave_no_hooks_behind(architecture: Architecture, _names: tuple[str, ...]) -> None:
    model = small_model(shape=(3, 8, 8), architecture=architecture)
    model.with_taps(torch.rand(2, 3, 8, 8))
    with pytest.raises(RuntimeError):
        model.with_taps(torch.rand(2, 5, 8, 8))  # a failing forward must clean up as well
    assert not any(module._forward_hooks for module in model.modules())


def test_taps_carry_gradients() -> None:
    model = small_model()
    _, taps = model.with_taps(torch.rand(2, 1, 8, 8))
    taps[-1].sum().backward()
    assert model.body[0][0].weight.grad is not None


def test_building_leaves_statistics_fresh() -> None:
    """Finding the taps runs the network; that must not be learnt from."""
    model = small_model()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            assert tensor.unique().tolist() == [0.0]
        if name.endswith("running_var"):
            assert tensor.unique().tolist() == [1.0]
        if name.endswith("num_batches_tracked"):
            assert int(tensor) == 0
    assert model.training


def test_a_copy_is_independent_and_has_its_own_taps() -> None:
    model = small_model().eval()
    x = torch.rand(2, 1, 8, 8, generator=seeded())
    copy = deepcopy(model)
    expected, taps = model.with_taps(x)
    with torch.no_grad():
        model.body[0][0].weight.zero_()
    logits, copied = copy.with_taps(x)
    assert torch.equal(logits, expected)
    assert all(torch.equal(a, b) for a, b in zip(taps, copied, strict=True))
    assert not torch.equal(model(x), expected)


@pytest.mark.parametrize("channels_last", [True, False])
def test_bfloat16_is_close_and_its_logits_are_float32(channels_last: bool) -> None:
    """bfloat16 keeps 8 bits: logits of order one agree to a few hundredths."""
    exact = small_model(shape=(3, 16, 16)).eval()
    model = small_model(shape=(3, 16, 16), compute=Compute("bfloat16", channels_last)).eval()
    x = torch.rand(4, 3, 16, 16, generator=seeded())
    with torch.no_grad():
        logits = model(x)
        expected = exact(x)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_memory_format_changes_nothing_but_rounding() -> None:
    x = torch.rand(4, 3, 16, 16, generator=seeded())
    models = [small_model(shape=(3, 16, 16), compute=Compute(channels_last=last)).eval() for last in (True, False)]
    torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-4, atol=1e-5)
    vectors = [Layout.of(model).read(model) for model in models]
    assert torch.equal(vectors[0], vectors[1])


@pytest.mark.parametrize(("architecture", "_names"), NETWORKS, ids=IDS)
def test_head_makes_the_logits(architecture: Architecture, _names: tuple[str, ...]) -> None:
    """With all of the head's weights zero and biases 0, 1, 2, 3 these are the logits."""
    model = small_model(shape=(3, 8, 8), architecture=architecture).eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.arange(4.0))
    assert model(torch.rand(1, 3, 8, 8)).tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_reset_linear_draws_from_its_generator() -> None:
    layers = [torch.nn.Linear(9, 4) for _ in range(3)]
    for layer, seed in zip(layers, (0, 0, 1), strict=True):
        reset_linear(layer, seeded(seed))
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert not torch.equal(layers[0].weight, layers[2].weight)
    assert layers[0].weight.abs().max().item() <= 1 / 3


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(ConfigError, match="depth=15"):
        WideResNet(depth=15)
    with pytest.raises(ConfigError, match="widen=0"):
        WideResNet(widen=0)
    with pytest.raises(ConfigError, match="width=0"):
        Cnn(width=0)
    with pytest.raises(ConfigError, match="8×8 pixels or more"):
        Cnn().check((1, 7, 8))
