"""The one training loop, against loops written out by hand."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import seeded, small_model, spotted, weights_of

from fl_sim.samples import Samples
from fl_sim.training import cross_entropy, decayed, fit, sgd


class Recorder(torch.optim.SGD):
    """Notes the learning rate of every step."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model.parameters(), lr=lr)
        self.rates: list[float] = []

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.rates.append(self.param_groups[0]["lr"])
        super().step(closure)


@pytest.mark.parametrize(
    ("epochs", "min_steps", "steps"),
    [(1, 0, 5), (3, 0, 15), (3, 15, 15), (1, 7, 7), (1, 20, 20), (2, 9, 10)],
)
def test_step_count_is_the_larger_of_epochs_and_min_steps(epochs: int, min_steps: int, steps: int) -> None:
    """40 samples in batches of 8 are 5 steps an epoch."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    optimizer = Recorder(model, 0.1)
    fitted = fit(model, spotted(40), optimizer, epochs=epochs, batch_size=8, rng=seeded(), min_steps=min_steps)
    assert fitted.steps == len(optimizer.rates) == steps


def naive_sgd(
    model: nn.Module, samples: Samples, *, epochs: int, size: int, lr: float, momentum: float, decay: float, seed: int
) -> float:
    """v ← m·v + g + λ·w, w ← w − lr·v, tensor by tensor; returns the last epoch's mean loss."""
    rng = seeded(seed)
    velocities = [torch.zeros_like(p) for p in model.parameters()]
    model.train()
    losses: list[float] = []
    for _ in range(epochs):
        losses = []
        for at in torch.randperm(len(samples), generator=rng).split(size):
            loss = F.cross_entropy(model(samples.images[at]), samples.labels[at])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g, v in zip(model.parameters(), gradients, velocities, strict=True):
                    v.mul_(momentum).add_(g + decay * p)
                    p.sub_(lr * v)
            losses.append(loss.item())
    return sum(losses) / len(losses)


def test_fit_equals_a_naive_loop() -> None:
    samples = spotted(40)
    naive, ours = small_model(), small_model()
    expected = naive_sgd(naive, samples, epochs=3, size=8, lr=0.05, momentum=0.9, decay=1e-3, seed=4)
    optimizer = sgd(ours, 0.05, momentum=0.9, weight_decay=1e-3)
    fitted = fit(ours, samples, optimizer, epochs=3, batch_size=8, rng=seeded(4))
    torch.testing.assert_close(weights_of(ours), weights_of(naive), rtol=1e-4, atol=1e-6)
    assert fitted.loss == pytest.approx(expected, rel=1e-4)
    assert not torch.allclose(weights_of(ours), weights_of(small_model()), atol=1e-2)


def test_the_same_generator_gives_the_same_bits_and_another_others() -> None:
    def trained(seed: int) -> Tensor:
        model = small_model()
        fit(model, spotted(40), sgd(model, 0.05), epochs=2, batch_size=8, rng=seeded(seed))
        return weights_of(model)

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_paper_schedule_divides_by_ten_after_every_fifth() -> None:
    """10 epochs, /10 every 2: of 50 steps ten each at 0.1, 0.01, 0.001, 1e-4, 1e-5."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    optimizer = Recorder(model, 0.1)
    schedule = decayed(0.1, 2 / 10)
    fit(model, spotted(40), optimizer, epochs=10, batch_size=8, rng=seeded(), schedule=schedule)
    expected = [0.1 * 0.1**stage for stage in range(5) for _ in range(10)]
    assert optimizer.rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("total", [5, 7, 30, 100, 200, 333])
def test_schedule_stages_begin_at_exact_shares(total: int) -> None:
    """Step s of n is in stage floor(5s/n), in whole numbers."""
    schedule = decayed(0.1, 0.2)
    assert [schedule(s / total) for s in range(total)] == [pytest.approx(0.1 ** (5 * s // total)) for s in range(total)]


def test_min_steps_stretches_the_schedule() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    optimizer = Recorder(model, 1.0)
    schedule = decayed(0.5, 1 / 2)
    fit(model, spotted(40), optimizer, epochs=1, batch_size=8, rng=seeded(), min_steps=12, schedule=schedule)
    assert optimizer.rates == [1.0] * 6 + [0.5] * 6


def test_every_group_keeps_its_own_rate_under_a_schedule() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 4))
    groups = [{"params": model[1].parameters(), "lr": 0.2}, {"params": model[2].parameters(), "lr": 0.4}]
    optimizer = torch.optim.SGD(groups)
    fit(model, spotted(40), optimizer, epochs=2, batch_size=8, rng=seeded(), schedule=decayed(0.5, 0.5))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.2])


def test_hooks_run_once_a_step_in_their_places() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    start, seen = weights_of(model), []

    def check_gradient(m: nn.Module) -> None:
        assert m[1].weight.grad is not None
        m[1].weight.grad.zero_()  # what the hook leaves is what the optimiser sees
        seen.append("backward")

    def after(m: nn.Module) -> None:
        seen.append("step")
        with torch.no_grad():
            m[1].bias.zero_()

    hooks = iter([check_gradient])  # an iterator must not run dry after the first step
    fit(
        model,
        spotted(16),
        sgd(model, 0.1),
        epochs=2,
        batch_size=8,
        rng=seeded(),
        after_backward=hooks,
        after_step=[after],
    )
    assert seen == ["backward", "step"] * 4
    assert torch.equal(model[1].weight.flatten(), start[:256])
    assert model[1].bias.tolist() == [0.0] * 4


def test_the_objective_decides() -> None:
    """Of ½‖w‖² the gradient is w: each step with lr 0.5 halves the weights; two steps leave a quarter."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    start = weights_of(model)

    def half_norm(m: nn.Module, _x: Tensor, _y: Tensor) -> Tensor:
        return sum((p.square().sum() / 2 for p in m.parameters()), torch.zeros(()))

    fit(model, spotted(16), sgd(model, 0.5), epochs=1, batch_size=8, rng=seeded(), objective=half_norm)
    torch.testing.assert_close(weights_of(model), start / 4)


def test_loss_is_the_mean_over_the_last_epochs_steps() -> None:
    """Losses 1, 2, 3, ... over 3 steps an epoch: the last epoch's 4, 5, 6 have mean 5; a part epoch counts alone."""

    def run(epochs: int, min_steps: int) -> float:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        count = iter(range(1, 100))

        def objective(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return 0 * cross_entropy(m, x, y) + next(count)

        optimizer = sgd(model, 0.1)
        return fit(
            model,
            spotted(24),
            optimizer,
            epochs=epochs,
            batch_size=8,
            rng=seeded(),
            objective=objective,
            min_steps=min_steps,
        ).loss

    assert run(2, 0) == pytest.approx(5.0)
    assert run(1, 5) == pytest.approx(4.5)


def test_training_on_nothing_is_an_error() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="no samples"):
        fit(model, spotted(4)[:0], sgd(model, 0.1), epochs=1, batch_size=8, rng=seeded())


def test_nesterov_needs_momentum_and_frozen_parameters_stay() -> None:
    model = small_model()
    assert sgd(model, 0.1, nesterov=True).param_groups[0]["nesterov"] is False
    assert sgd(model, 0.1, momentum=0.9, nesterov=True).param_groups[0]["nesterov"] is True
    model.head.weight.requires_grad_(False)
    frozen = model.head.weight.clone()
    fit(model, spotted(16), sgd(model, 0.1), epochs=1, batch_size=8, rng=seeded())
    assert torch.equal(model.head.weight, frozen)


def test_training_leaves_the_samples_alone() -> None:
    samples = spotted(16)
    images, labels = samples.images.clone(), samples.labels.clone()
    model = deepcopy(small_model())
    fit(model, samples, sgd(model, 0.1), epochs=1, batch_size=8, rng=seeded())
    assert torch.equal(samples.images, images)
    assert torch.equal(samples.labels, labels)
    assert model.training
