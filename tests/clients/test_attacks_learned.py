"""Attacks that bring a trigger of their own: A3FL, IBA, CerP."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F
from toys import client_context, seeded, small_model, spotted, threat, weights_of

from clients.attacks.a3fl import A3fl, Adaptive, parameters_cosine
from clients.attacks.cerp import LEAD, Cerp, Tuned, closeness, projected
from clients.attacks.hooked import hooked
from clients.attacks.iba import Iba
from clients.attacks.model_replacement import ModelReplacement
from clients.attacks.restrained import least_used
from clients.local.fedprox import FedProx
from clients.local.sgd import Sgd
from clients.triggers.badnets import BadNets
from clients.triggers.blend import Blend
from clients.triggers.lira import Lira
from fl_sim import execution
from fl_sim.backdoor import Backdoor, Goal
from fl_sim.build import build
from fl_sim.composing import compose_config
from fl_sim.errors import ConfigError
from fl_sim.layout import Layout
from fl_sim.metrics import evaluate
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import Client, Threatening, Update, Workshop
from fl_sim.training import fit, sgd

BENIGN = Sgd(epochs=1, batch_size=8, lr=0.1, momentum=0.5, weight_decay=0.01)
ATTACKS: list[Any] = [A3fl, Iba, Cerp]
LAYOUT = Layout.of(small_model())
SPLIT = LAYOUT.parameters


@lru_cache(maxsize=1)
def trained() -> Classifier:
    model = small_model()
    fit(model, spotted(64), sgd(model, 0.1, momentum=0.9), epochs=6, batch_size=16, rng=seeded(5))
    return model.eval()


def workshop(record: Any = None) -> Workshop:
    frozen = deepcopy(trained()).eval().requires_grad_(False)
    return Workshop(frozen, Goal(), 4, seeded(), rank=0, attackers=1, record=record or {})


def threatened(attack: Any, **known: Any) -> Threatening:
    return replace(threat(Backdoor(attack.adopt(BadNets()), Goal(), 4)), **known)


def update_of(attack: Client, threatening: Threatening, seed: int = 0) -> Update:
    model = deepcopy(trained())
    return attack.update(model, spotted(24), client_context(model, seed, threatening=threatening))


# What they share ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ATTACKS)
def test_an_update_is_fresh_and_brings_a_record(kind: Any) -> None:
    """Neither the delta nor the record shares memory with the received model, the knowledge or each other."""
    attack = kind(BENIGN)
    known = threatened(attack, previous=weights_of(small_model(seed=2)))
    model = deepcopy(trained())
    ctx = client_context(model, threatening=known)
    received = ctx.received.clone()
    update = attack.update(model, spotted(24), ctx)
    assert update.record is not None
    tensors = [update.delta, *(value for value in update.record.values() if isinstance(value, Tensor))]
    pointers = {tensor.untyped_storage().data_ptr() for tensor in [*tensors, ctx.received]}
    assert len(pointers) == len(tensors) + 1
    assert torch.equal(ctx.received, received)
    assert torch.isfinite(update.delta).all()
    assert not torch.equal(update.delta, torch.zeros_like(update.delta))


@pytest.mark.parametrize("kind", ATTACKS)
def test_a_boost_leaves_buffers_alone(kind: Any) -> None:
    """Boost 4 is four times boost 1 in the parameters; statistics of batch normalisation are as they were."""
    one, four = (update_of(a := kind(BENIGN, boost=boost), threatened(a)).delta for boost in (1.0, 4.0))
    torch.testing.assert_close(four[:SPLIT], 4 * one[:SPLIT])
    assert torch.equal(four[SPLIT:], one[SPLIT:])


@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("benign", [BENIGN, FedProx(epochs=1, batch_size=8, mu=0.5)])
def test_without_what_is_special_it_is_model_replacement_with_that_trigger(kind: Any, benign: Sgd) -> None:
    """Nothing held back (share 1, no pull, no spread): to the bit what model replacement does with the same trigger."""
    neutral = {Iba: {"share": 1.0}, Cerp: {"pull": 0.0, "spread": 0.0}}.get(kind, {})
    attack = kind(benign, boost=2.0, **neutral)
    known = threatened(attack, previous=weights_of(small_model(seed=2)))
    plain = ModelReplacement(benign, boost=2.0)
    assert torch.equal(update_of(attack, known).delta, update_of(plain, known).delta)


@pytest.mark.parametrize("kind", ATTACKS)
def test_build_takes_the_attacks_own_trigger(kind: Any) -> None:
    """a3fl and cerp in the configured trigger's place, iba its generator; the goal's `auto` is all_to_one."""
    name = kind.__name__.lower()
    parts = build(compose_config([f"attack={name}", "trigger=blend", "attack.boost=1.5"]))
    assert isinstance(parts.trigger, {A3fl: Adaptive, Iba: Lira, Cerp: Tuned}[kind])
    if kind is not Iba:
        assert parts.trigger.carrier == Blend()
    assert isinstance(parts.attack, kind)
    assert parts.attack.boost == 1.5


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: A3fl(BENIGN, balance=-1), "balance"),
        (lambda: A3fl(BENIGN, unlearn_lr=0), "unlearn_lr"),
        (lambda: A3fl(BENIGN, poison_rate=2), "poison_rate"),
        (lambda: Iba(BENIGN, share=0), "share"),
        (lambda: Iba(BENIGN, radius=0), "radius"),
        (lambda: Iba(BENIGN, epsilon=0), "epsilon"),
        (lambda: Cerp(BENIGN, pull=-1), "pull"),
        (lambda: Cerp(BENIGN, trigger_step=0), "trigger_step"),
        (lambda: Cerp(BENIGN, boost=0), "boost"),
    ],
)
def test_impossible_settings_are_refused(make: Any, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.key == key


# A3FL -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def entropy(trigger: Any, model: Classifier) -> float:
    """How far a model is from taking stamped images for class 0."""
    return float(F.cross_entropy(model(trigger(spotted(64).images)), torch.zeros(64, dtype=torch.long)))


def test_a3fl_learns_within_the_support_from_grey() -> None:
    """First lesson with step 0: grey in BadNets' patch, nothing elsewhere. With steps, still only the patch changes."""
    trigger = A3fl(BENIGN, trigger_epochs=4).adopt(BadNets(3))
    still = replace(trigger, step=0.0)
    x = spotted(64).images
    grey = still.recall(still.learn(spotted(64), workshop()))(x)
    assert (grey[:, :, 5:, 5:] == 0.5).all()
    learned = trigger.recall(trigger.learn(spotted(64), workshop()))
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[5:, 5:] = False
    assert torch.equal(learned(x)[..., outside], x[..., outside])
    plain = still.recall(still.learn(spotted(64), workshop()))
    assert entropy(learned, workshop().model) < entropy(plain, workshop().model)
    assert torch.equal(trigger(x), BadNets(3)(x))  # before anything is learned


def test_a3fl_fools_the_unlearned_model_better_with_the_adversary_than_without() -> None:
    """The point of the paper: against the copy that has unlearned the trigger, λ₀ > 0 gives the lower entropy."""
    samples, shop = spotted(64), workshop()
    results = []
    for balance in (0.0, 5.0):
        trigger = A3fl(BENIGN, trigger_epochs=3, balance=balance, unlearn_epochs=3, unlearn_lr=0.05).adopt(BadNets(3))
        learned = trigger.recall(trigger.learn(samples, replace(shop, rng=seeded(1))))
        grey = torch.full((1, 1, 8, 8), 0.5)
        hidden = BadNets(3, "white")(torch.zeros(1, 1, 8, 8))
        adversary = trigger.unlearned(grey, hidden, samples, replace(shop, rng=seeded(1)))
        results.append(entropy(learned, adversary))
    assert results[1] < results[0]


def test_the_adversary_has_unlearned_and_is_similar() -> None:
    """cos of a model with itself is 1; a copy trained on stamped images differs, the model does not."""
    shop, samples = workshop(), spotted(64)
    held = weights_of(shop.model)
    assert float(parameters_cosine(shop.model, shop.model)) == pytest.approx(1.0, abs=1e-5)
    trigger = A3fl(BENIGN, unlearn_epochs=2, unlearn_lr=0.05).adopt(BadNets(3))
    hidden = BadNets(3, "white")(torch.zeros(1, 1, 8, 8))
    adversary = trigger.unlearned(torch.full((1, 1, 8, 8), 0.5), hidden, samples, shop)
    assert 0.8 < float(parameters_cosine(adversary, shop.model)) < 1 - 1e-6
    assert torch.equal(weights_of(shop.model), held)
    assert not adversary.training


# IBA ------------------------------------------------------------------------------------------------------------------


def test_least_used_ranks_absolute_progress() -> None:
    """Of −5, 1, 0, −2 the half that moved least is 0 and 1."""
    progress = torch.tensor([-5.0, 1.0, 0.0, -2.0])
    assert least_used(progress, 0.5).tolist() == [False, True, True, False]
    assert least_used(progress, 1.0).all()


@pytest.mark.parametrize("benign", [BENIGN, FedProx(epochs=1, batch_size=8, mu=0.5)])
def test_iba_moves_only_the_least_used_parameters(benign: Sgd) -> None:
    """In spite of momentum and weight decay; buffers move freely; in the first round all may move."""
    attack = Iba(benign, share=0.4)
    previous = weights_of(trained()) + torch.randn(LAYOUT.size, generator=seeded(4))
    delta = update_of(attack, threatened(attack, previous=previous)).delta
    free = least_used((weights_of(trained()) - previous)[:SPLIT], 0.4)
    assert (delta[:SPLIT][~free] == 0).all()
    assert (delta[:SPLIT][free] != 0).float().mean() > 0.9
    assert delta[SPLIT:].abs().sum() > 0
    first = update_of(attack, threatened(attack)).delta
    assert (first[:SPLIT] != 0).float().mean() > 0.9


@pytest.mark.parametrize("radius", [0.05, 1e6])
def test_iba_stays_in_its_ball(radius: float) -> None:
    """‖Δ‖₂ of the parameters is the radius where it binds; a huge one changes nothing."""
    attack = Iba(BENIGN, radius=radius)
    delta = update_of(attack, threatened(attack)).delta
    free = update_of(Iba(BENIGN), threatened(Iba(BENIGN))).delta
    if radius > 1:
        torch.testing.assert_close(delta, free, rtol=1e-4, atol=1e-6)
    else:
        assert float(delta[:SPLIT].norm()) <= radius * (1 + 1e-4)
        assert float(free[:SPLIT].norm()) > radius


def test_hooks_come_after_the_clients_own() -> None:
    """FedProx's own hook and ours are all called, ours last."""
    called: list[str] = []
    model = small_model()
    ctx = hooked(
        client_context(model),
        after_backward=[lambda _: called.append("backward")],
        after_step=[lambda _: called.append("step")],
    )
    optimizer = sgd(model, 0.1)
    own = [lambda _: called.append("own")]
    ctx.fit(model, spotted(8), optimizer, epochs=1, batch_size=8, rng=seeded(), after_backward=own)  # type: ignore[arg-type]
    assert called == ["own", "backward", "step"]


# CerP -----------------------------------------------------------------------------------------------------------------


def test_projection_onto_a_ball() -> None:
    """(3, 4) has norm 5: radius 1 makes it (0.6, 0.8), radius 10 leaves it."""
    assert projected(torch.tensor([3.0, 4.0]), 1.0).tolist() == pytest.approx([0.6, 0.8])
    assert projected(torch.tensor([3.0, 4.0]), 10.0).tolist() == [3.0, 4.0]


@pytest.mark.parametrize("radius", [0.0, 0.3, 1.0])
def test_cerps_pattern_stays_near_the_configured_one(radius: float) -> None:
    """‖T'(x) − T(x)‖₂ ≤ r on every image, inside the support only; radius 0 is the configured trigger itself."""
    trigger = Cerp(BENIGN, trigger_radius=radius, trigger_epochs=3).adopt(BadNets(3))
    learned = trigger.recall(trigger.learn(spotted(64), workshop()))
    x = spotted(64).images
    change = learned(x) - BadNets(3)(x)
    assert float(change.flatten(1).norm(dim=1).max()) <= radius + 1e-5
    assert (float(change.abs().max()) > 0.05) == (radius > 0)
    assert not change[:, :, :5].any()
    if radius:
        assert entropy(learned, workshop().model) < entropy(BadNets(3), workshop().model)


def test_closeness_is_the_gradient_of_its_two_terms() -> None:
    """Against autograd on α·‖d‖² + β·cos(d, u), d = w − received, at a random d and u."""
    model = small_model()
    received = weights_of(small_model(seed=1))
    lead = torch.randn(LAYOUT.size, generator=seeded(2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    closeness(LAYOUT, received, lead, pull=0.3, spread=0.7)(model)
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    w = weights_of(model)[:SPLIT].clone().requires_grad_()
    moved = w - received[:SPLIT]
    objective = 0.3 * moved.square().sum() + 0.7 * F.cosine_similarity(moved, lead[:SPLIT], dim=0)
    [expected] = torch.autograd.grad(objective, w)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_closeness_is_finite_before_the_first_step() -> None:
    """At d = 0 there is no direction: nothing is added."""
    model = small_model()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    closeness(LAYOUT, weights_of(model), torch.ones(LAYOUT.size), 0.3, 0.7)(model)
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_cerp_keeps_near_and_turns_away() -> None:
    """Pull shortens the update; spread lowers its cosine with the lead attacker's update, which the record brings."""
    free = Cerp(BENIGN, boost=1.0, pull=0.0, spread=0.0)
    first = update_of(free, threatened(free), seed=1)
    assert first.record is not None
    assert torch.equal(torch.as_tensor(first.record[LEAD]), first.delta)
    known = threatened(free, record=first.record)
    base = update_of(free, known).delta[:SPLIT]
    pulled = update_of(replace(free, pull=2.0), known).delta[:SPLIT]
    spread = update_of(replace(free, spread=2.0), known).delta[:SPLIT]
    assert pulled.norm() < 0.8 * base.norm()
    lead = first.delta[:SPLIT]
    cosines = [float(F.cosine_similarity(each, lead, dim=0)) for each in (base, spread)]
    assert cosines[1] < cosines[0] - 0.1


# Proof ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ATTACKS)
def test_the_attackers_model_obeys(kind: Any) -> None:
    """After one attack of ten epochs on 64 samples: ASR ≥ 0.9 at an ACC within 0.05; before it ≤ 0.3."""
    attack = kind(Sgd(epochs=10, batch_size=16, lr=0.1), poison_rate=0.3)
    known = threatened(attack)
    model = deepcopy(trained())
    before = evaluate(model, spotted(80), known.backdoor)
    update = attack.update(model, spotted(64), client_context(model, threatening=known))
    assert update.record is not None
    after = evaluate(model, spotted(80), known.backdoor.recalling(update.record))
    assert before.asr is not None
    assert after.asr is not None
    assert before.asr <= 0.3
    assert after.asr >= 0.9
    assert after.acc >= before.acc - 0.05


@pytest.mark.parametrize("attack", ["a3fl", "iba", "cerp"])
def test_a_run_carries_the_record(attack: str, tmp_path: Path) -> None:
    """Two rounds, all attackers in each: nobody fails, and what was learned is in the checkpoint."""
    folder = tiny.run(tmp_path / "run", f"attack={attack}", "clients_per_round=6", "rounds=2")
    assert tiny.events(folder, "client_failed") == []
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["states"]["trigger"]
    assert set(saved) == {"a3fl": {"pattern"}, "iba": {"weights"}, "cerp": {"pattern", LEAD}}[attack]


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["a3fl", "iba", "cerp"])
@pytest.mark.parametrize("seed", [10_007, 20_011])
def test_the_default_federation_obeys(attack: str, seed: int, tmp_path: Path) -> None:
    """Undefended averaging on the default scenario: ASR above 0.9 at an ACC above 0.8."""
    (tmp_path / "run").mkdir()
    execution.start(compose_config([f"attack={attack}", "eraser=none", f"seed={seed}"]), tmp_path / "run", [])
    rounds = tiny.events(tmp_path / "run", "round")
    assert max(event["asr"] for event in rounds) > 0.9
    assert sum(event["asr"] for event in rounds[-10:]) / 10 > 0.5
    assert sum(event["acc"] for event in rounds[-10:]) / 10 > 0.8  # boosting makes single rounds shaky
