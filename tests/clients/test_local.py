"""Honest training: FedAvg's and FedProx's clients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import client_context, seeded, small_model, spotted, weights_of

from clients.local.fedprox import FedProx, proximal_pull
from clients.local.sgd import Sgd
from fl_sim.augment import Augment
from fl_sim.errors import ConfigError
from fl_sim.layout import Layout
from fl_sim.protocols import Client, Update

RECIPE = {"epochs": 2, "batch_size": 8, "lr": 0.1, "momentum": 0.5, "weight_decay": 1e-3}


def update_of(client: Client, seed: int = 0) -> Update:
    model = small_model()
    return client.update(model, spotted(24), client_context(model, seed))


def naive(mu: float) -> Tensor:
    """Local SGD on F(w) + μ/2 ‖w − w₀‖² with the proximal term in the loss, not in a hook."""
    model, samples, rng = small_model(), spotted(24), seeded(0)
    start = [p.detach().clone() for p in model.parameters()]
    before = weights_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=1e-3)
    model.train()
    for _ in range(2):
        for at in torch.randperm(24, generator=rng).split(8):
            loss = F.cross_entropy(model(samples.images[at]), samples.labels[at])
            for p, anchor in zip(model.parameters(), start, strict=True):
                loss = loss + mu / 2 * (p - anchor).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weights_of(model) - before


def test_sgd_is_the_naive_loop() -> None:
    update = update_of(Sgd(**RECIPE))
    torch.testing.assert_close(update.delta, naive(0.0), rtol=1e-3, atol=1e-6)
    assert float(update.delta.norm()) > 0.1
    assert update.samples == 24
    assert 0 < update.loss < 2
    assert update.private is None


def test_the_delta_leads_from_the_received_to_the_trained_model() -> None:
    model = small_model()
    ctx = client_context(model)
    received = ctx.received.clone()
    update = Sgd(**RECIPE).update(model, spotted(24), ctx)
    torch.testing.assert_close(received + update.delta, weights_of(model))
    assert torch.equal(ctx.received, received)


def test_updates_are_fresh_vectors() -> None:
    """Two clients on one worker model, one after the other: the second must not change the first's update."""
    model = small_model()
    layout, samples = Layout.of(model), spotted(24)
    ctx = client_context(model, 0)
    first = Sgd(**RECIPE).update(model, samples, ctx)
    kept = first.delta.clone()
    layout.load(model, ctx.received)
    second = Sgd(**RECIPE).update(model, samples, client_context(model, 1))
    assert torch.equal(first.delta, kept)
    assert not torch.equal(second.delta, kept)
    layout.load(model, ctx.received)
    assert torch.equal(Sgd(**RECIPE).update(model, samples, client_context(model, 0)).delta, kept)


def test_a_cosine_falls_within_each_update_and_constant_is_the_default() -> None:
    """One batch an epoch, four epochs: step k has the rate 0.1 · (1 + cos(π·k/4))/2, written out as a loop."""
    rates = [0.1, 0.1 * (2 + math.sqrt(2)) / 4, 0.05, 0.1 * (2 - math.sqrt(2)) / 4]
    model, samples = small_model(), spotted(8)
    before = weights_of(model)
    model.train()
    for rate in rates:
        model.zero_grad()
        F.cross_entropy(model(samples.images), samples.labels).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * p.grad
    expected = weights_of(model) - before
    for client in (Sgd(epochs=4, schedule="cosine"), FedProx(epochs=4, schedule="cosine", mu=0.0)):
        model = small_model()
        delta = client.update(model, samples, client_context(model)).delta
        torch.testing.assert_close(delta, expected, rtol=1e-3, atol=1e-5)
    assert Sgd().schedule == "constant"
    assert not torch.allclose(update_of(Sgd(schedule="cosine")).delta, update_of(Sgd()).delta)


def test_fedprox_without_mu_is_sgd_to_the_bit() -> None:
    assert torch.equal(update_of(FedProx(**RECIPE, mu=0.0)).delta, update_of(Sgd(**RECIPE)).delta)


@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_fedprox_is_the_naive_loop(mu: float) -> None:
    torch.testing.assert_close(update_of(FedProx(**RECIPE, mu=mu)).delta, naive(mu), rtol=1e-3, atol=1e-5)


def test_the_larger_mu_the_nearer_it_stays() -> None:
    split = Layout.of(small_model()).parameters
    moved = [float(update_of(FedProx(**RECIPE, mu=mu)).delta[:split].norm()) for mu in (0.0, 0.5, 2.0)]
    assert moved[0] > moved[1] > moved[2]


def test_the_proximal_gradient_by_hand() -> None:
    """w = (3, 5), anchor (1, 1), gradient (10, 20), μ = 0.5: (10 + 0.5·2, 20 + 0.5·4) = (11, 22)."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 5.0]]))
    model.weight.grad = torch.tensor([[10.0, 20.0]])
    proximal_pull([torch.ones(1, 2)], 0.5)(model)
    assert model.weight.grad.tolist() == [[11.0, 22.0]]
    assert model.weight.tolist() == [[3.0, 5.0]]


def test_the_pull_passes_over_parameters_without_a_gradient() -> None:
    model = nn.Linear(2, 1)
    model.bias.grad = torch.zeros(1)
    proximal_pull([torch.zeros(1, 2), torch.zeros(1)], 1.0)(model)
    assert model.weight.grad is None
    assert torch.equal(model.bias.grad, model.bias.detach())


def test_augment_is_the_data_sets_and_off_by_default() -> None:
    model, samples = small_model(), spotted(24)
    deltas = []
    for client, augment in ((Sgd(), Augment()), (Sgd(), Augment(crop=2)), (Sgd(augment=True), Augment(crop=2))):
        model = small_model()
        deltas.append(client.update(model, samples, client_context(model, augment=augment)).delta)
    assert torch.equal(deltas[0], deltas[1])
    assert not torch.equal(deltas[0], deltas[2])


@pytest.mark.parametrize("knobs", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"momentum": 1.0}, {"mu": -0.1}])
def test_impossible_settings_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(ConfigError) as caught:
        FedProx(**knobs)  # type: ignore[arg-type]
    assert [caught.value.key] == list(knobs)
