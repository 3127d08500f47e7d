"""Data poisoning and model replacement."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import client_context, seeded, small_model, spotted, threat, weights_of, white_backdoor

from clients.attacks.data_poisoning import DataPoisoning, own_pace
from clients.attacks.model_replacement import ModelReplacement, boosted, replacing_factor
from clients.local.fedprox import FedProx
from clients.local.sgd import Sgd
from fl_sim.backdoor import PoisonMode
from fl_sim.errors import ConfigError
from fl_sim.layout import Layout
from fl_sim.metrics import evaluate
from fl_sim.protocols import Client, Threatening, Update

BENIGN = Sgd(epochs=1, batch_size=8, lr=0.1)
LAYOUT = Layout.of(small_model())
SPLIT = LAYOUT.parameters


def update_of(client: Client, threatening: Threatening | None = None, seed: int = 0) -> Update:
    model = small_model()
    given = threatening or threat(white_backdoor())
    return client.update(model, spotted(24), client_context(model, seed, threatening=given))


@pytest.mark.parametrize("benign", [BENIGN, FedProx(epochs=1, batch_size=8, mu=0.5)])
def test_poisoning_nothing_per_batch_is_the_benign_client_to_the_bit(benign: Sgd) -> None:
    """Per batch the poisoning draws nothing, so the batches are the same."""
    assert torch.equal(update_of(DataPoisoning(benign, 0.0, "per_batch")).delta, update_of(benign).delta)


def test_poisoning_no_sample_of_the_set_is_the_benign_client() -> None:
    """The draw of whom to poison comes first from the client's generator; the benign client then goes on from there."""
    model, rng = small_model(), seeded(0)
    torch.randperm(24, generator=rng)
    ctx = client_context(model)
    ctx.rng.set_state(rng.get_state())
    expected = BENIGN.update(model, spotted(24), ctx)
    assert torch.equal(update_of(DataPoisoning(BENIGN, 0.0, "dataset")).delta, expected.delta)


@pytest.mark.parametrize("mode", ["dataset", "per_batch"])
def test_poisoning_trains_as_the_benign_client_on_poisoned_samples(mode: PoisonMode) -> None:
    model, backdoor = small_model(), white_backdoor(target=2)
    ctx = client_context(model)
    expected = BENIGN.update(model, backdoor.poison(spotted(24), 0.5, mode, ctx.rng), ctx)
    update = update_of(DataPoisoning(BENIGN, 0.5, mode), threat(backdoor))
    assert torch.equal(update.delta, expected.delta)
    assert not torch.equal(update.delta, update_of(BENIGN).delta)
    assert (update.samples, update.loss) == (24, expected.loss)


def test_the_trigger_really_gets_into_the_model() -> None:
    model, backdoor = small_model(), white_backdoor(target=2)
    attack = DataPoisoning(Sgd(epochs=10, batch_size=8, lr=0.1), 0.3)
    attack.update(model, spotted(48), client_context(model, threatening=threat(backdoor)))
    score = evaluate(model, spotted(40), backdoor)
    assert score.asr == 1.0
    assert score.acc > 0.9


def test_the_attackers_own_epochs_and_rate() -> None:
    attack = DataPoisoning(BENIGN, 0.5, epochs=3, lr=0.02)
    slower = DataPoisoning(Sgd(epochs=3, batch_size=8, lr=0.02), 0.5)
    assert torch.equal(update_of(attack).delta, update_of(slower).delta)
    assert not torch.equal(update_of(attack).delta, update_of(DataPoisoning(BENIGN, 0.5)).delta)
    assert own_pace(BENIGN, None, None) is BENIGN
    assert own_pace(FedProx(mu=0.7), 5, None) == FedProx(mu=0.7, epochs=5)


@pytest.mark.parametrize(
    ("knobs", "key"),
    [({"poison_rate": 1.1}, "poison_rate"), ({"poison_rate": -0.1}, "poison_rate"), ({"epochs": 0}, "epochs")],
)
def test_impossible_attacks_are_refused(knobs: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataPoisoning(BENIGN, **knobs)  # type: ignore[arg-type]
    assert caught.value.key == key


def test_boost_one_is_data_poisoning_to_the_bit() -> None:
    plain, boosted_ = DataPoisoning(BENIGN, 0.5), ModelReplacement(BENIGN, 0.5, boost=1.0)
    assert torch.equal(update_of(boosted_).delta, update_of(plain).delta)


def test_boosting_scales_parameters_and_leaves_buffers() -> None:
    plain, triple = (update_of(ModelReplacement(BENIGN, 0.5, boost=factor)).delta for factor in (1.0, 3.0))
    torch.testing.assert_close(triple[:SPLIT], 3 * plain[:SPLIT])
    assert torch.equal(triple[SPLIT:], plain[SPLIT:])
    assert plain[SPLIT:].abs().sum() > 0
    assert not torch.equal(plain[:SPLIT], torch.zeros(SPLIT))


def test_boosted_leaves_its_input() -> None:
    delta = torch.ones(LAYOUT.size)
    out = boosted(delta, 5.0, LAYOUT)
    assert delta.unique().tolist() == [1.0]
    assert out[:SPLIT].unique().tolist() == [5.0]
    assert out[SPLIT:].unique().tolist() == [1.0]


@pytest.mark.parametrize(("weight", "rate", "factor"), [(0.25, 1.0, 4.0), (0.1, 0.5, 20.0), (1.0, 1.0, 1.0)])
def test_replacing_factor(weight: float, rate: float, factor: float) -> None:
    """1/(η · weight)."""
    assert replacing_factor(threat(white_backdoor(), weight=weight, rate=rate)) == pytest.approx(factor)


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("weights", [[0.25, 0.75], [0.1, 0.2, 0.3, 0.4]])
def test_auto_makes_the_average_the_attackers_own_model(weights: list[float], rate: float) -> None:
    """All others at rest (Δ = 0): w + η · Σ w_k Δ_k = w + η · w_a · Δ/(η · w_a) = w + Δ, the attacker's local model."""
    alone = DataPoisoning(BENIGN, 0.5)
    model = small_model()
    start = weights_of(model)
    alone.update(model, spotted(24), client_context(model, threatening=threat(white_backdoor())))
    own = weights_of(model)

    known = threat(white_backdoor(), weight=weights[0], rate=rate)
    attacker = update_of(ModelReplacement(BENIGN, 0.5, boost="auto"), known).delta
    deltas = torch.zeros(len(weights), LAYOUT.size)
    deltas[0] = attacker
    mean = rate * torch.tensor(weights) @ deltas
    torch.testing.assert_close((start + mean)[:SPLIT], own[:SPLIT], rtol=1e-4, atol=1e-6)


def test_two_attackers_share_the_replacement() -> None:
    """Weights 0.1 and 0.3 of attackers a, b: the average is (a·0.1 + b·0.3)/0.4, the mean of their models."""
    known = threat(white_backdoor(), weight=0.4)

    def deltas(attack: Client) -> Tensor:
        return torch.stack([update_of(attack, known, seed).delta for seed in (0, 1)])

    mean = torch.tensor([0.1, 0.3]) @ deltas(ModelReplacement(BENIGN, 0.5, boost="auto"))
    expected = torch.tensor([0.25, 0.75]) @ deltas(DataPoisoning(BENIGN, 0.5))
    torch.testing.assert_close(mean[:SPLIT], expected[:SPLIT], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("boost", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_boosts_are_refused(boost: float) -> None:
    with pytest.raises(ConfigError, match="boost"):
        ModelReplacement(BENIGN, boost=boost)


def test_auto_needs_a_server_with_a_rate() -> None:
    with pytest.raises(ConfigError, match="boost=auto"):
        ModelReplacement(BENIGN, boost="auto").check_server(None)
    ModelReplacement(BENIGN, boost="auto").check_server(0.5)
    ModelReplacement(BENIGN, boost=3.0).check_server(None)
