"""Fed-NAD: a private teacher, its attention, what is held out, and what survives an interruption."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F
from toys import client_context, seeded, small_model, spotted, weights_of

from clients.attacks.data_poisoning import DataPoisoning
from clients.local.fed_nad import TEACHER, FedNad, Plain, divided
from clients.local.sgd import Sgd
from fl_sim import execution
from fl_sim.attention import attention_loss
from fl_sim.errors import ConfigError
from fl_sim.metrics import accuracy
from fl_sim.protocols import Client, ClientContext, State, Update
from fl_sim.randomness import generator
from fl_sim.rounds import Federation
from fl_sim.samples import Samples

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.01}


def update_of(client: Client, samples: Samples | None = None, *, seed: int = 0, private: State | None = None) -> Update:
    model = small_model()
    return client.update(model, samples or spotted(24), client_context(model, seed, private=private))


# Distillation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"optimizer": "sgd", "momentum": 0.5}, {"augment": True, "schedule": "cosine"}])
def test_without_weights_it_is_the_plain_client_to_the_bit(how: dict[str, Any]) -> None:
    """0 · AT adds zeros to the gradient, and the teacher draws from a generator of its own, so nothing else differs."""
    client = FedNad(**QUICK, **how, weights=(0.0,), held_out=0.0)
    assert torch.equal(update_of(client).delta, update_of(client.undefended).delta)
    if "optimizer" in how:
        assert torch.equal(update_of(client).delta, update_of(Sgd(**QUICK, momentum=0.5)).delta)
    # The control: with weights the teacher is felt.
    assert not torch.equal(update_of(replace(client, weights=(1.0,))).delta, update_of(client).delta)


def trained(start: Tensor | None, seed: int, epochs: int, lr: float) -> Tensor:
    """A teacher by a naive loop: Adam on the cross-entropy, with the order of batches that its own generator draws."""
    model, samples = small_model(), spotted(24)
    ctx = client_context(model)
    if start is not None:
        ctx.layout.load(model, start)
    rng = generator(seed, "teacher")
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for at in torch.randperm(24, generator=rng).split(8):
            adam.zero_grad()
            F.cross_entropy(model(samples.images[at]), samples.labels[at]).backward()
            adam.step()
    return weights_of(model)


def test_the_teacher_begins_as_the_received_model_and_goes_on_from_round_to_round() -> None:
    """Its second round starts where its first ended, not from what is received; its pace may differ."""
    client = FedNad(**QUICK, held_out=0.0, teacher_epochs=3, teacher_lr=0.02)
    first = update_of(client, seed=1)
    assert first.private is not None
    torch.testing.assert_close(first.private[TEACHER], trained(None, 1, 3, 0.02))
    handed = deepcopy(first.private)
    second = update_of(client, seed=2, private=first.private)
    assert second.private is not None
    once_more = trained(handed[TEACHER], 2, 3, 0.02)  # type: ignore[arg-type]
    torch.testing.assert_close(second.private[TEACHER], once_more)
    assert torch.equal(first.private[TEACHER], handed[TEACHER])  # type: ignore[arg-type]
    assert not torch.allclose(once_more, trained(None, 2, 3, 0.02), atol=1e-3)


def test_the_student_is_the_naive_loop() -> None:
    """CE + Σ w·‖Â_S − Â_T‖² with the teacher that the update remembers, frozen and in evaluation mode."""
    weights = (0.5, 2.0, 1.0)
    update = update_of(FedNad(**QUICK, held_out=0.0, weights=weights))
    assert update.private is not None
    student, teacher, samples, rng = small_model(), small_model(), spotted(24), seeded(0)
    client_context(teacher).layout.load(teacher, update.private[TEACHER])  # type: ignore[arg-type]
    teacher.eval()
    student.train()
    before = weights_of(student)
    adam = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(2):
        for at in torch.randperm(24, generator=rng).split(8):
            logits, taps = student.with_taps(samples.images[at])
            loss = F.cross_entropy(logits, samples.labels[at])
            for weight, own, other in zip(weights, taps, teacher.with_taps(samples.images[at])[1], strict=True):
                a, b = (m.square().sum(1).flatten(1) for m in (own, other.detach()))
                gap = a / (a.norm(dim=1, keepdim=True) + 1e-6) - b / (b.norm(dim=1, keepdim=True) + 1e-6)
                loss = loss + weight * gap.square().sum() / len(gap)
            adam.zero_grad()
            loss.backward()
            adam.step()
    torch.testing.assert_close(update.delta, weights_of(student) - before, rtol=1e-3, atol=1e-4)


def test_the_default_weights_are_the_codes_own_at_its_maps_size() -> None:
    """1000/2000/2000/1 on mean squares over 56², 28², 14² and 7² positions, to the two or three digits given."""
    expected = [1000 / 56**2, 2000 / 28**2, 2000 / 14**2, 1 / 7**2]
    assert FedNad().weights == pytest.approx(expected, rel=0.021)
    student, teacher = (
        [torch.rand(2, 3, side, side, generator=seeded(seed)) for side in (56, 28, 14, 7)] for seed in (1, 2)
    )
    code = attention_loss(student, teacher, (1000, 2000, 2000, 1), "mean_square")
    assert float(attention_loss(student, teacher, expected)) == pytest.approx(float(code), rel=1e-5)


def test_the_received_vector_stays_as_it_was() -> None:
    model = small_model()
    ctx = client_context(model)
    received = ctx.received.clone()
    update = FedNad(**QUICK).update(model, spotted(24), ctx)
    assert torch.equal(ctx.received, received)
    torch.testing.assert_close(received + update.delta, weights_of(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


# Held out -------------------------------------------------------------------------------------------------------------


def test_a_tenth_is_held_out_and_never_the_last_sample() -> None:
    """Of 20 samples 2, of 4 none (0.4 rounds to 0), and of one sample none whatever the share."""
    for count, share, aside in ((20, 0.1, 2), (4, 0.1, 0), (1, 0.9, 0), (3, 0.9, 2)):
        kept, held_out = divided(spotted(count), share, seeded())
        assert (len(kept), len(held_out)) == (count - aside, aside)
        together = torch.cat([kept.images, held_out.images]).flatten(1).sum(1).sort().values
        torch.testing.assert_close(together, spotted(count).images.flatten(1).sum(1).sort().values)


def test_held_out_samples_are_the_same_each_round_and_never_trained_on() -> None:
    """Noise in their place changes the score and nothing else, in two rounds with different generators."""
    samples, client = spotted(40), FedNad(**QUICK, held_out=0.25)
    order = torch.randperm(40, generator=generator(0, "held out"))
    images = samples.images.clone()
    images[order[:10]] = torch.rand(10, 1, 8, 8, generator=seeded(3))
    for seed in (0, 1):
        update, other = (
            update_of(client, samples, seed=seed),
            update_of(client, Samples(images, samples.labels), seed=seed),
        )
        assert torch.equal(update.delta, other.delta)
        assert update.private is not None
        assert other.private is not None
        assert torch.equal(update.private[TEACHER], other.private[TEACHER])  # type: ignore[arg-type]
        assert update.samples == 30


def test_the_accuracy_is_the_sent_models_on_what_was_held_out() -> None:
    samples = spotted(40)
    model = small_model()
    update = FedNad(**QUICK, held_out=0.25).update(model, samples, client_context(model))
    _, held_out = divided(samples, 0.25, generator(0, "held out"))
    assert update.accuracy == accuracy(model, held_out)
    assert update_of(FedNad(**QUICK, held_out=0.0)).accuracy is None


# Attackers ------------------------------------------------------------------------------------------------------------


def test_attackers_train_at_the_same_pace_without_a_teacher() -> None:
    client = FedNad(epochs=3, batch_size=16, lr=0.02, weight_decay=1e-4, weights=(5.0,))
    assert DataPoisoning(client).trainer == Plain(epochs=3, batch_size=16, lr=0.02, weight_decay=1e-4)
    assert DataPoisoning(client, epochs=6, lr=0.5).trainer == replace(client.undefended, epochs=6, lr=0.5)
    assert client.undefended.optimizer == "adam"


@pytest.mark.parametrize(
    "knobs",
    [
        {"teacher_epochs": 0},
        {"teacher_lr": 0.0},
        {"weights": ()},
        {"weights": (-1.0,)},
        {"power": 0.5},
        {"held_out": 1.0},
        {"epochs": 0},
    ],
)
def test_impossible_settings_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        FedNad(**knobs)
    assert [caught.value.key] == list(knobs)


# Runs -----------------------------------------------------------------------------------------------------------------

RUN = ("client=fed_nad", "client.lr=0.01", "rounds=4", "threat.fraction=0.34", "attack.boost=1")


def test_an_interrupted_run_keeps_its_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after round 3's training and resumed from round 2: the same numbers, the same final model."""
    whole = tiny.run(tmp_path / "whole", *RUN)
    original = Federation._save

    def broken(self: Federation, t: int) -> None:
        if t == 3:
            raise KeyboardInterrupt
        original(self, t)

    with monkeypatch.context() as patch:
        patch.setattr(Federation, "_save", broken)
        with pytest.raises(KeyboardInterrupt):
            tiny.run(tmp_path / "broken", *RUN)
    execution.resume(tmp_path / "broken")
    assert tiny.numbers(tmp_path / "broken") == tiny.numbers(whole)
    models = [torch.load(folder / "model.pt") for folder in (whole, tmp_path / "broken")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    for event in tiny.events(whole, "round"):
        each = event["client_accs"].values()
        assert 0 <= event["client_acc_min"] <= event["client_acc"] <= 1
        assert (min(each), sum(each) / len(each)) == (event["client_acc_min"], event["client_acc"])
    # The control: clients that forget give other numbers, so a lost teacher would have been noticed.
    remembering = FedNad.update

    def forgetting(self: FedNad, model: Any, samples: Samples, ctx: ClientContext) -> Update:
        return replace(remembering(self, model, samples, ctx), private={})

    monkeypatch.setattr(FedNad, "update", forgetting)
    assert tiny.numbers(tiny.run(tmp_path / "forgetful", *RUN)) != tiny.numbers(whole)


def test_only_clients_that_were_honest_have_teachers_and_only_such_clients_are_scored(tmp_path: Path) -> None:
    """Two of six attack whenever sampled; plain clients hold nothing out, so their rounds have no `client_acc`."""
    folder = tiny.run(tmp_path / "run", *RUN, "clients_per_round=6", "rounds=1")
    owners = {path.name.split("_")[0] for path in (folder / "clients").iterdir()}
    assert len(owners) == 4
    assert set(tiny.events(folder, "round")[0]["client_accs"]) == owners
    assert all(set(torch.load(path)) == {TEACHER} for path in (folder / "clients").iterdir())
    plain = tiny.run(tmp_path / "plain", "rounds=1")
    assert "client_acc" not in tiny.events(plain, "round")[0]
