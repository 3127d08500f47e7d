"""A model as a flat vector."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import seeded, small_model

from fl_sim.build import build
from fl_sim.composing import compose_config
from fl_sim.layout import Layout


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def test_parameters_first_then_float_buffers_and_no_counters() -> None:
    """Conv 2·9 + 2, BN 2 + 2, linear 24 + 3: 51 parameters; running mean and variance: 4 more; the counter is out."""
    layout = Layout.of(tiny())
    assert layout.parameters == 20 + 4 + 27
    assert layout.size == 51 + 4
    assert layout.names == (
        *("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"),
        *("1.running_mean", "1.running_var"),
    )
    assert layout.shapes[0] == (2, 1, 3, 3)


def test_the_vector_holds_the_tensors_in_order() -> None:
    model = tiny()
    layout = Layout.of(model)
    tensors = [*model.parameters(), model[1].running_mean, model[1].running_var]
    assert torch.equal(layout.read(model), torch.cat([tensor.detach().flatten() for tensor in tensors]))
    for part, tensor in zip(layout.parts(layout.read(model)), tensors, strict=True):
        assert torch.equal(part, tensor)


@pytest.mark.parametrize("make", [tiny, small_model])
def test_load_then_read_gives_the_same_vector(make: type[nn.Module]) -> None:
    model = make()
    layout = Layout.of(model)
    vector = torch.rand(layout.size, generator=seeded())
    layout.load(model, vector)
    assert torch.equal(layout.read(model), vector)


def test_loading_another_models_vector_makes_equal_outputs() -> None:
    a, b = small_model(0).eval(), small_model(1).eval()
    x = torch.rand(3, 1, 8, 8, generator=seeded())
    assert not torch.equal(a(x), b(x))
    Layout.of(a).load(b, Layout.of(a).read(a))
    assert torch.equal(a(x), b(x))


def test_vectors_never_alias_the_model_or_each_other() -> None:
    for model in (tiny(), nn.Linear(3, 1, bias=False)):  # the second has a single tensor
        layout = Layout.of(model)
        first, second = layout.read(model), layout.read(model)
        expected = first.clone()
        first.fill_(9.0)
        assert torch.equal(second, expected)
        assert torch.equal(layout.read(model), expected)
        assert not first.requires_grad
        source = second.clone()
        layout.load(model, source)
        source.fill_(7.0)
        assert torch.equal(layout.read(model), expected)


def test_counters_stay_where_the_model_is() -> None:
    model = tiny()
    model[1].num_batches_tracked.fill_(41)
    layout = Layout.of(model)
    layout.load(model, torch.ones(layout.size))
    assert int(model[1].num_batches_tracked) == 41


def test_normalisation_constants_are_not_part_of_it() -> None:
    model = small_model()
    assert not {"mean", "std"} & set(Layout.of(model).names)
    assert not {"mean", "std"} & set(model.state_dict())


def test_only_variances_are_clamped() -> None:
    model = tiny()
    layout = Layout.of(model)
    vector = torch.full((layout.size,), -1.0)
    layout.clamp_variances(vector)
    assert vector[:53].unique().tolist() == [-1.0]
    assert vector[53:].tolist() == [0.0, 0.0]
    vector[53:] = torch.tensor([0.5, 2.0])
    layout.clamp_variances(vector)
    assert vector[53:].tolist() == [0.5, 2.0]


@pytest.mark.parametrize("shape", [(54,), (56,), (1, 55)])
def test_a_vector_of_another_size_is_refused_and_nothing_is_loaded(shape: tuple[int, ...]) -> None:
    model = tiny()
    layout = Layout.of(model)
    before = layout.read(model)
    with pytest.raises(ValueError, match="the layout has 55 entries"):
        layout.load(model, torch.zeros(shape))
    assert torch.equal(layout.read(model), before)


@pytest.mark.parametrize("name", ["cnn", "resnet18", "wrn_16_1", "vgg11_bn", "vit_tiny"])
def test_the_one_walk_finds_what_pytorchs_own_walks_find(name: str) -> None:
    """Names and order of the parameters, then of the floating-point buffers that a saved model holds."""
    model = build(compose_config([f"model={name}", "data=synthetic", "data.image_size=32"])).model
    body, _ = model.body((3, 32, 32), 10)
    body.register_buffer("unsaved", torch.zeros(2), persistent=False)
    body.tied = body.get_submodule(next(path for path, _ in body.named_modules() if path))  # the same tensors again
    saved = body.state_dict()
    buffers = [n for n, b in body.named_buffers() if n in saved and b.is_floating_point()]
    layout = Layout.of(body)
    assert list(layout.names) == [n for n, _ in body.named_parameters()] + buffers
    assert layout.parameters == sum(p.numel() for p in body.parameters())
