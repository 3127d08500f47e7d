"""Anti-Backdoor Learning: its three steps, one by one and together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import client_context, seeded, small_model, spotted, weights_of

from clients.attacks.data_poisoning import DataPoisoning
from clients.local.abl import Abl, climbing, held_up, losses, parted, unlearning
from clients.local.sgd import Sgd
from fl_sim import execution
from fl_sim.annealing import cosine
from fl_sim.backdoor import Backdoor, Goal
from fl_sim.errors import ConfigError
from fl_sim.metrics import evaluate
from fl_sim.models.classifier import Classifier
from fl_sim.protocols import Client
from fl_sim.samples import Samples
from fl_sim.training import Fitted, fit


@pytest.mark.parametrize(
    ("loss", "ascent", "value", "slope"),
    [(0.3, "sign", -0.3, -1), (0.8, "sign", 0.8, 1), (0.3, "flooding", 0.7, -1), (0.8, "flooding", 0.8, 1)],
)
def test_the_loss_is_held_up_by_hand(loss: float, ascent: Any, value: float, slope: float) -> None:
    """γ = 0.5. Below it: sign(ℓ − γ)·ℓ = −0.3, and |0.3 − 0.5| + 0.5 = 0.7; above it both are ℓ. Below, ℓ climbs."""
    at = torch.tensor(loss, requires_grad=True)
    held = held_up(at, 0.5, ascent)
    held.backward()
    assert float(held.detach()) == pytest.approx(value)
    assert at.grad is not None
    assert float(at.grad) == slope


def test_the_objectives_are_those_of_the_batchs_mean() -> None:
    model, samples = small_model().eval(), spotted(12)
    x, y = samples.images, samples.labels
    mean = float(F.cross_entropy(model(x), y).detach())
    for objective, expected in (
        (climbing(mean + 0.1, "sign"), -mean),
        (climbing(mean - 0.1, "sign"), mean),
        (climbing(mean + 0.1, "flooding"), mean + 0.2),
        (unlearning, -mean),
    ):
        assert float(objective(model, x, y).detach()) == pytest.approx(expected)


def test_losses_are_each_samples_own_and_measuring_changes_nothing() -> None:
    model, samples = small_model(), spotted(20)
    model.train()
    before = weights_of(model)
    measured = losses(model, samples, chunk=7)
    assert model.training
    assert torch.equal(weights_of(model), before)
    model.eval()
    naive = [
        float(F.cross_entropy(model(samples.images[i : i + 1]), samples.labels[i : i + 1]).detach()) for i in range(20)
    ]
    torch.testing.assert_close(measured, torch.tensor(naive))


def test_the_lowest_losses_are_parted_from_the_others() -> None:
    """Of five values 40 % are two: 0.1 and the first of the two 0.2; a share below one sample is one sample."""
    values = torch.tensor([0.9, 0.2, 0.5, 0.2, 0.1])
    assert [part.tolist() for part in parted(values, 0.4)] == [[1, 4], [0, 2, 3]]
    assert [part.tolist() for part in parted(values, 0.01)] == [[4], [0, 1, 2, 3]]


class Noting:
    """The training loop, and what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.samples: list[Samples] = []

    def __call__(self, model: nn.Module, samples: Samples, optimizer: Any, **how: Any) -> Fitted:
        lr = optimizer.param_groups[0]["lr"]
        fitted = fit(model, samples, optimizer, **how)
        self.calls.append({"samples": len(samples), "steps": fitted.steps, "lr": lr, "schedule": how.get("schedule")})
        self.samples.append(samples)
        return fitted


def noted(client: Client, samples: Samples) -> Noting:
    model, noting = small_model(), Noting()
    client.update(model, samples, replace(client_context(model), fit=noting))
    return noting


def test_the_steps_of_an_update() -> None:
    """24 samples in batches of 8 for 10 epochs: 30 steps, a fifth held up; a quarter, 6 samples, is one batch."""
    client = Abl(epochs=10, batch_size=8, isolated=0.25, unlearning_epochs=4, schedule="cosine")
    noting = noted(client, spotted(24))
    assert noting.calls == [
        {"samples": 24, "steps": 6, "lr": 0.1, "schedule": None},
        {"samples": 18, "steps": 24, "lr": 0.1, "schedule": cosine},
        {"samples": 6, "steps": 4, "lr": 5e-4, "schedule": None},
    ]
    parts = torch.cat([noting.samples[1].images, noting.samples[2].images]).flatten(1).sum(1)
    torch.testing.assert_close(parts.sort().values, spotted(24).images.flatten(1).sum(1).sort().values)


def test_the_first_step_is_a_part_of_an_epoch_where_there_are_few() -> None:
    """A fifth of 2 · 3 steps is one step; without unlearning there are two trainings; one sample is plain training."""
    assert [call["steps"] for call in noted(Abl(batch_size=8, unlearning_epochs=0), spotted(24)).calls] == [1, 5]
    assert [call["samples"] for call in noted(Abl(), spotted(1)).calls] == [1]


def poisoned(samples: Samples, stamped: int) -> Samples:
    """The first samples all white and of class 0."""
    images, labels = samples.images.clone(), samples.labels.clone()
    images[:stamped], labels[:stamped] = 1.0, 0
    return Samples(images, labels)


def test_what_is_isolated_is_what_was_poisoned() -> None:
    """Noise takes long to learn, the white images of class 0 no time: all of the isolated tenth are white."""
    images, labels = torch.rand(100, 1, 8, 8, generator=seeded(1)), torch.arange(100) % 4
    noting = noted(Abl(epochs=10, batch_size=10, lr=0.05, isolated=0.1), poisoned(Samples(images, labels), 20))
    assert bool((noting.samples[2].images == 1).all())
    assert noting.samples[2].labels.tolist() == [0] * 10


class Corner:
    """A white square in a black one, at the bottom, where no class has its row."""

    def __call__(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, 6:, 4:] = 0.0
        x[:, :, 6:, 6:] = 1.0
        return x


def hard(count: int, seed: int) -> Samples:
    """Loud noise in which a row is a little brighter: a backdoor is learned sooner than the classes."""
    labels = torch.arange(count) % 4
    images = torch.rand(count, 1, 8, 8, generator=seeded(seed))
    rows = images[torch.arange(count), :, labels]
    images[torch.arange(count), :, labels] = 0.6 * rows + 0.4
    return Samples(images, labels)


def test_unlearning_takes_the_backdoor_out_and_leaves_the_rest() -> None:
    """A tenth stamped: most stamped images are class 0 after plain training, hardly any with ABL, at the same ACC."""
    backdoor = Backdoor(Corner(), Goal(), 4)
    data, test = backdoor.poison(hard(400, 1), 0.1, "dataset", seeded()), hard(100, 2)
    pace: dict[str, Any] = {"epochs": 10, "batch_size": 20}
    scores = []
    for client in (Sgd(**pace), Abl(**pace, isolated=0.05, unlearning_epochs=20, unlearning_lr=5e-3)):
        model: Classifier = small_model()
        client.update(model, data, client_context(model))
        scores.append(evaluate(model, test, backdoor))
    plain, defended = scores
    assert plain.asr is not None
    assert defended.asr is not None
    assert plain.asr > 0.6
    assert defended.asr < 0.2
    assert defended.acc > plain.acc - 0.15 > 0.35


def test_attackers_train_plainly_at_the_same_pace() -> None:
    client = Abl(epochs=3, batch_size=16, lr=0.02, schedule="cosine", augment=True)
    assert client.undefended == Sgd(epochs=3, batch_size=16, lr=0.02, schedule="cosine", augment=True)
    assert DataPoisoning(client, epochs=5).trainer == replace(client.undefended, epochs=5)


@pytest.mark.parametrize(
    "knobs",
    [
        {"gamma": -1.0},
        {"isolating": 0.0},
        {"isolating": 1.0},
        {"isolated": 0.0},
        {"isolated": 1.0},
        {"unlearning_epochs": -1},
        {"unlearning_lr": 0.0},
        {"lr": 0.0},
    ],
)
def test_impossible_settings_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Abl(**knobs)
    assert [caught.value.key] == list(knobs)


def test_contaminated_clients_defend_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As honest clients with poisoned data do: all four of each round run ABL, the contaminated ones among them."""
    updates: list[int] = []
    original = Abl.update

    def counting(self: Abl, *told: Any) -> Any:
        updates.append(1)
        return original(self, *told)

    monkeypatch.setattr(Abl, "update", counting)
    folder = tiny.run(tmp_path / "run", "client=abl", "attack=contaminated", "rounds=2")
    assert len(updates) == 8
    assert sum(event["malicious"] for event in tiny.events(folder, "round")) > 0


def test_it_trains_a_centralized_victim(tmp_path: Path) -> None:
    """`central.epochs` replaces its own: of 10 · 5 steps (285 samples, batches of 64) a fifth is held up, 10 steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    words = ("client=abl", "central.epochs=10", "client.unlearning_epochs=3", f"output={tmp_path}")
    execution.start(tiny.tiny(*words), folder, ["fl-sim", "central"])
    scored = [event["epoch"] for event in tiny.events(folder, "central")]
    assert scored == list(range(1, 2 + 8 + 3 + 1))  # two epochs held up, eight of learning, three of unlearning
