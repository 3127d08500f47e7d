"""The networks: sizes, taps, initialisation, precision."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
import torchvision
from omegaconf import OmegaConf
from torch import Generator, nn
from toys import seeded, small_model, spotted

from fl_sim.build import component, describe
from fl_sim.composing import choices, conf_folder
from fl_sim.errors import ConfigError
from fl_sim.layout import Layout
from fl_sim.models.classifier import (
    Architecture,
    BatchNorm,
    Classifier,
    Compute,
    build_classifier,
    initialise,
    reset_linear,
)
from fl_sim.models.cnn import Cnn
from fl_sim.models.cost import cost
from fl_sim.models.preact_resnet import PreactResNet18
from fl_sim.models.resnet import ResNet18
from fl_sim.models.vgg import Vgg11Bn
from fl_sim.models.vit import VitTiny
from fl_sim.models.wide_resnet import WideResNet
from fl_sim.training import fit, sgd

NETWORKS: list[tuple[Architecture, tuple[str, ...]]] = [
    (Cnn(), ("0", "1", "2")),
    (ResNet18(), ("layer1", "layer2", "layer3", "layer4")),
    (PreactResNet18(), ("group1", "group2", "group3", "group4")),
    (WideResNet(), ("group1", "group2", "group3")),
]
IDS = ["cnn", "resnet18", "preact_resnet18", "wrn_16_1"]
SMALL_VIT = VitTiny(width=24, depth=3)
EVERY: dict[str, Architecture] = {
    **dict(zip(IDS, (architecture for architecture, _ in NETWORKS), strict=True)),
    "wrn_40_2": WideResNet(40, 2),
    "vgg11_bn": Vgg11Bn(),
    "vit_tiny": SMALL_VIT,
}
every_network = pytest.mark.parametrize("architecture", EVERY.values(), ids=EVERY)


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (16, 3), (28, 1), (32, 3)])
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
        (PreactResNet18(), 3, 11_172_170),
        (Vgg11Bn(), 3, 9_231_114),
        (VitTiny(), 3, 5_362_762),
    ],
)
def test_parameter_counts_at_ten_classes(architecture: Architecture, channels: int, parameters: int) -> None:
    """ResNet-18 with the CIFAR stem: 11,173,962 (kuangliu/pytorch-cifar).

    WRN-16-1: stem 3·16·9 = 432; group 1, twice 16→16: 2·(32 + 2304 + 32 + 2304) = 9,344; group 2, 16→32 with 1×1
    shortcut: 32 + 4608 + 64 + 9216 + 512 = 14,432 and 32→32: 2·(64 + 9216) = 18,560; group 3, 32→64:
    64 + 18432 + 128 + 36864 + 2048 = 57,536 and 64→64: 2·(128 + 36864) = 73,984; last BN 128; head 640 + 10.
    Sum 175,066. WRN-40-2: "2.2 M" in its paper's table, 2,243,546 by the same sum.
    CNN: convolutions 144 + 4608 + 18432, BNs 32 + 64 + 128, head 650.
    PreActResNet-18: kuangliu's 11,171,146 and the last BN's 2·512. VGG-11: torchvision's features 9,225,984 (its
    published 132,868,840 less the three linear layers' 123,642,856) and the head's 5,130.
    ViT: patches 9,408; class token 192; 65 positions 12,480; 12 blocks of 12·192² + 13·192 = 444,864; norm 384;
    head 1,930.
    """
    model = small_model(classes=10, shape=(channels, 32, 32), architecture=architecture)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert Layout.of(model).parameters == parameters


@every_network
def test_weights_depend_on_the_given_generator_only(architecture: Architecture) -> None:
    """One seed gives one model whatever torch's own state is; another changes every tensor that is not constant.

    Constant are only biases, the scales of normalisations, and their statistics.
    """

    def drawn(seed: int, torch_seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch_seed)
        return dict(small_model(seed, shape=(3, 8, 8), architecture=architecture).named_parameters())

    first, again, other = drawn(0, 1), drawn(0, 2), drawn(1, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    constant = {name: tensor for name, tensor in first.items() if tensor.min() == tensor.max()}
    assert not [name for name in first.keys() - constant if torch.equal(first[name], other[name])]
    assert all(tensor.dim() == 1 and float(tensor.detach()[0]) in (0.0, 1.0) for tensor in constant.values())


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


@every_network
def test_taps_leave_no_hooks_behind(architecture: Architecture) -> None:
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


@every_network
def test_head_makes_the_logits(architecture: Architecture) -> None:
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


def on_meta(architecture: Architecture, shape: tuple[int, int, int]) -> Classifier:
    """A classifier that knows shapes only: fast, whatever the network."""
    with torch.device("meta"):
        body, candidates = architecture.body(shape, 7)
        return Classifier(body, candidates, shape, (0.5,) * shape[0], (0.25,) * shape[0], Compute())


def test_every_model_of_the_configuration_works_on_every_size_or_refuses_it() -> None:
    """8 to 64 pixels, grey and colour: logits, and taps of at least 2×2 whose resolutions never rise again.

    Only ViT refuses sizes: those of whose divisors none is near an eighth, as of primes.
    """
    refused = set()
    for name, architecture in configured().items():
        for side in (8, 9, 23, 28, 64):
            shape = (1 if side % 2 else 3, side, side)
            try:
                getattr(architecture, "check", lambda _: None)(shape)
            except ConfigError:
                refused.add((name, side))
                continue
            model = on_meta(architecture, shape)
            logits, taps = model.with_taps(torch.empty(2, *shape, device="meta"))
            sides = [tuple(tap.shape[2:]) for tap in taps]
            assert logits.shape == (2, 7)
            assert len(taps) >= 2
            assert min(min(each) for each in sides) >= 2
            assert all(later <= earlier for earlier, later in pairwise(sides))
    assert refused == {("vit_tiny", 23)}


def configured() -> dict[str, Architecture]:
    """The architectures that conf/model describes."""
    found = choices("model", [conf_folder()])
    return {name: component("model", OmegaConf.to_container(OmegaConf.load(path))) for name, path in found.items()}


@pytest.mark.parametrize(
    ("side", "sides", "channels", "pools"),
    [
        (32, [32, 16, 8, 4, 2], [64, 128, 256, 512, 512], 5),
        (28, [28, 14, 7, 3], [64, 128, 256, 512], 4),
        (8, [8, 4, 2], [64, 128, 512], 3),
    ],
)
def test_vgg_is_tapped_before_pooling_and_pools_while_it_can(
    side: int, sides: list[int], channels: list[int], pools: int
) -> None:
    """At 32 pixels torchvision's five poolings; at 8, after 8 -> 4 -> 2, only the last one: the convolutions of the
    third and fourth stage work on 2×2 maps, of which the fifth's are the last."""
    model = small_model(shape=(3, side, side), architecture=Vgg11Bn()).eval()
    with torch.no_grad():
        _, taps = model.with_taps(torch.rand(2, 3, side, side, generator=seeded()))
    assert [tap.shape[2] for tap in taps] == sides
    assert [tap.shape[1] for tap in taps] == channels
    assert sum(isinstance(module, nn.MaxPool2d) for module in model.modules()) == pools
    assert all(float(tap.min()) == 0 for tap in taps)  # after the ReLU


def test_vgg_has_the_same_tensors_at_every_size_as_torchvisions() -> None:
    """So a model that was trained at one image size can be the start of a run at another."""
    shapes = [
        {n: t.shape for n, t in on_meta(Vgg11Bn(), (3, side, side)).body.features.state_dict().items()}
        for side in (8, 32)
    ]
    with torch.device("meta"):
        theirs = torchvision.models.vgg11_bn().features.state_dict()
    assert shapes[0] == shapes[1] == {name: tensor.shape for name, tensor in theirs.items()}


def test_vit_computes_what_torchvisions_does() -> None:
    """The same weights in torchvision's VisionTransformer give the same logits, in training and in evaluation."""
    model = small_model(shape=(3, 16, 16), architecture=SMALL_VIT)
    theirs = torchvision.models.VisionTransformer(16, 2, 3, 3, 24, 96, num_classes=4)
    names = {
        "conv_proj.": "patches.",
        "encoder.pos_embedding": "positions",
        "encoder.layers.encoder_layer_": "blocks.",
        "encoder.ln.": "norm.",
        "heads.head.": "head.",
    }
    ours = model.body.state_dict()
    state = {}
    for name in theirs.state_dict():
        start = next((old for old in names if name.startswith(old)), "")
        state[name] = ours.pop(names.get(start, "") + name.removeprefix(start))
    assert not ours
    theirs.load_state_dict(state)
    x = torch.rand(4, 3, 16, 16, generator=seeded())
    for training in (True, False):
        model.train(training)
        theirs.train(training)
        torch.testing.assert_close(model(x), theirs((x - 0.5) / 0.25))


def test_vit_taps_are_the_tokens_of_a_third_two_thirds_and_all_blocks_as_a_grid() -> None:
    """Token 1 + 8·row + column of blocks 4, 8 and 12 stands at (row, column); token 0, the class's, nowhere."""
    architecture = VitTiny(width=24)
    model = small_model(shape=(1, 16, 16), architecture=architecture).eval()
    x = torch.rand(2, 1, 16, 16, generator=seeded())
    with torch.no_grad():
        logits, taps = model.with_taps(x)
        _, tokens = model.observe(x, [f"blocks.{block - 1}" for block in (4, 8, 12)])
        assert torch.equal(logits, model(x))
    assert [tuple(tap.shape) for tap in taps] == [(2, 24, 8, 8)] * 3
    for tap, each in zip(taps, tokens, strict=True):
        for row, column in ((0, 0), (0, 7), (3, 5), (7, 7)):
            assert torch.equal(tap[:, :, row, column], each[:, 1 + 8 * row + column])
    assert not torch.equal(taps[0], taps[1])


@pytest.mark.parametrize(("image", "patch"), [(8, 1), (12, 1), (16, 2), (28, 4), (32, 4), (48, 6), (64, 8), (224, 28)])
def test_vit_patches_are_an_eighth_of_the_image(image: int, patch: int) -> None:
    """Or the nearest divisor of its side: 28/8 = 3.5 is between 2 and 4, nearer to 4; 12/8 = 1.5 takes the smaller."""
    assert VitTiny().side(image) == patch
    VitTiny().check((3, image, image))


def test_nothing_is_dropped() -> None:
    """Dropout would draw from the process's own generator, and training would not be a function of the seed."""
    for architecture in configured().values():
        modules = on_meta(architecture, (3, 32, 32)).modules()
        assert not [module for module in modules if isinstance(module, nn.Dropout) and module.p > 0]


@every_network
def test_a_single_sample_can_be_trained_on(architecture: Architecture) -> None:
    """On 8×8 images some networks end in 1×1 maps, of which PyTorch's batch normalisation refuses a lone one."""
    model = small_model(shape=(1, 8, 8), architecture=architecture)
    before = Layout.of(model).read(model)
    fitted = fit(model, spotted()[:1], sgd(model, 0.05), epochs=2, batch_size=8, rng=seeded())
    after = Layout.of(model).read(model)
    assert fitted.steps == 2
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)


@pytest.mark.parametrize("architecture", [Cnn(), WideResNet(), SMALL_VIT], ids=["cnn", "wrn_16_1", "vit_tiny"])
def test_networks_learn(architecture: Architecture) -> None:
    """Four easy classes: from −ln ¼ = 1.39 the loss falls by half within 80 steps, for ViT as for the others."""
    model = small_model(shape=(1, 8, 8), architecture=architecture)
    fitted = fit(model, spotted(), sgd(model, 0.05, momentum=0.9), epochs=16, batch_size=8, rng=seeded())
    assert fitted.loss < 0.7


def test_a_lone_value_is_normalised_by_the_running_statistics() -> None:
    """As in evaluation, and the statistics stay; the control: PyTorch's own refuses."""
    layer, plain = BatchNorm(3), nn.BatchNorm2d(3)
    for each in (layer, plain):
        each.running_mean = torch.tensor([1.0, 2.0, 3.0])
        each.running_var = torch.tensor([1.0, 4.0, 9.0])
    x = torch.rand(1, 3, 1, 1, generator=seeded())
    with pytest.raises(ValueError, match="more than 1 value"):
        plain(x)
    assert torch.equal(layer.train()(x), plain.eval()(x))
    assert layer.running_mean is not None
    assert layer.running_mean.tolist() == [1.0, 2.0, 3.0]
    assert int(layer.num_batches_tracked or 0) == 0


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 2, 2), (5, 3, 4, 4)])
def test_any_other_batch_is_normalised_as_by_pytorch(shape: tuple[int, ...]) -> None:
    """Bit for bit: outputs, gradients and statistics."""
    results = []
    for layer in (BatchNorm(3), nn.BatchNorm2d(3)):
        x = torch.rand(shape, generator=seeded()).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        results.append([out, x.grad, layer.weight.grad, *layer.state_dict().values()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_weights_of_an_unknown_kind_are_not_left_to_chance() -> None:
    """An outside network's parameter that no rule draws would differ from run to run; it must draw it itself."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(3))

    class Own(Scaled):
        def initialise(self, rng: Generator) -> None:
            nn.init.uniform_(self.scale, generator=rng)

    with pytest.raises(TypeError, match=r"Scaled has weights of an unknown kind: give it an initialise\(rng\)"):
        initialise(nn.Sequential(Scaled()), seeded())
    model = nn.Sequential(Own(), nn.Linear(2, 2, bias=False), nn.ConvTranspose2d(1, 1, 2), nn.LayerNorm(2))
    initialise(model, seeded())
    assert torch.equal(model[0].scale, torch.empty(3).uniform_(generator=seeded()))


@pytest.mark.parametrize(
    ("architecture", "parameters", "products"),
    [(Cnn(16), 24_346, 2_802_304), (VitTiny(), 5_362_762, 365_107_584)],
)
def test_cost_by_hand(architecture: Architecture, parameters: int, products: int) -> None:
    """CNN: 32²·27·16 + 16²·144·32 + 8²·288·64 + 64·10. ViT: patches 64·48·192; each of 12 blocks, on 65 tokens,
    65·12·192² for its linear layers and 2·65²·192 for attention; head 1,920."""
    assert cost(architecture) == (parameters, products)


def test_the_list_tells_each_models_cost() -> None:
    """ResNet-18 with the CIFAR stem: 11.17 million parameters and the 0.56 GFLOPs (multiply-adds) often quoted."""
    rows = {name: sentence for name, sentence, *_ in describe("model", [conf_folder()])}
    assert rows["resnet18"].endswith(" 11.2M parameters, 0.56 GMAC at 32×32.")
    assert all("GMAC" in sentence for sentence in rows.values())


def test_impossible_networks_are_refused() -> None:
    for knobs, complaint in (
        ({"depth": 2}, "depth=2"),
        ({"heads": 0}, "heads=0"),
        ({"width": 100}, "width=100: must be a multiple of the number of heads, 3"),
        ({"patch": 0}, "patch=0"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            VitTiny(**knobs)  # type: ignore[arg-type]
    for patch in (3, 32):
        with pytest.raises(ConfigError, match="must divide the images' 32 pixels"):
            VitTiny(patch=patch).check((3, 32, 32))
    with pytest.raises(ConfigError, match="vit_tiny on 23×23 images: needs a size with a divisor near an eighth"):
        VitTiny().check((3, 23, 23))
    with pytest.raises(ConfigError, match="needs square images"):
        VitTiny().check((3, 32, 16))
    with pytest.raises(ConfigError, match="depth=15"):
        WideResNet(depth=15)
    with pytest.raises(ConfigError, match="widen=0"):
        WideResNet(widen=0)
    with pytest.raises(ConfigError, match="width=0"):
        Cnn(width=0)
    with pytest.raises(ConfigError, match="8×8 pixels or more"):
        Cnn().check((1, 7, 8))
