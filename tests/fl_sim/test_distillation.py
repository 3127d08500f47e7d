"""What distillations share: softened predictions, maps of one size, running statistics, the cosine schedule."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from toys import seeded, server_context, small_model, spotted, weights_of

from fl_sim.annealing import Annealed, cosine
from fl_sim.batch_statistics import batch_norms, frozen_statistics, measure_statistics
from fl_sim.distillation import frozen_copy, same_size, softened_kl
from fl_sim.training import fit


def test_softened_kl_by_hand() -> None:
    """Teacher (log 4, 0) at T = 2 is (2/3, 1/3), student ½, ½: 4 · (⅔ log 4⁄3 + ⅓ log ⅔)."""
    expected = 4 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))
    teacher = torch.tensor([[math.log(4), 0.0]])
    assert float(softened_kl(torch.zeros(1, 2), teacher, 2.0)) == pytest.approx(expected, rel=1e-5)
    assert float(softened_kl(teacher + 3, teacher, 2.0)) == pytest.approx(0.0, abs=1e-6)


def test_the_larger_map_is_pooled() -> None:
    """2×2 blocks of a 4×4 ramp have means 2.5, 4.5, 10.5, 12.5; the smaller map comes back as it is, on either side."""
    large, small = torch.arange(16.0).view(1, 1, 4, 4), torch.randn(1, 3, 2, 2, generator=seeded())
    expected = torch.tensor([[2.5, 4.5], [10.5, 12.5]])
    pooled, same = same_size(large, small)
    assert torch.equal(pooled[0, 0], expected)
    assert same is small
    assert torch.equal(same_size(small, large)[1][0, 0], expected)


def test_frozen_statistics_leave_no_trace_but_normalise_by_the_batch() -> None:
    model = small_model().train()
    x, before = spotted(16).images, weights_of(model)
    counters = [int(norm.num_batches_tracked or 0) for norm in batch_norms(model)]
    with frozen_statistics(model):
        inside = model(x)
    assert torch.equal(weights_of(model), before)
    assert [int(norm.num_batches_tracked or 0) for norm in batch_norms(model)] == counters
    torch.testing.assert_close(inside, model(x))
    assert not torch.equal(weights_of(model), before)  # afterwards they are tracked again


def test_statistics_are_the_mean_over_one_pass() -> None:
    """The first layer's running mean after a pass in two equal batches is the mean of what it gets from all images."""
    model = small_model()
    clean = spotted(32)
    measure_statistics(model, clean, seeded(), size=16)
    first = batch_norms(model)[0]
    before = model.body[0][0]((clean.images - model.mean) / model.std)  # type: ignore[index,operator]
    assert first.running_mean is not None
    torch.testing.assert_close(first.running_mean, before.detach().mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert first.momentum == 0.1
    assert model.training


def test_a_frozen_copy_lets_gradients_through() -> None:
    model = small_model().train()
    copy = frozen_copy(model)
    x = spotted(2).images.requires_grad_()
    copy(x).sum().backward()
    assert x.grad is not None
    assert not copy.training
    assert model.training
    assert all(p.grad is None and not p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_the_rate_falls_along_half_a_cosine() -> None:
    """1, ½ and 0 at the start, the middle and the end; SGD without momentum moves by rate · gradient = 1 · factor."""
    assert [cosine(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    model, clean, rates = small_model(), spotted(32), []
    ctx = server_context(model, clean)

    def objective(learner: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rates.append(float(next(learner.parameters()).detach().flatten()[0]))
        return sum(p.flatten()[0] for p in learner.parameters())  # type: ignore[return-value]

    tuned = Annealed(epochs=2, min_steps=0, batch_size=16, lr=1.0, momentum=0.0, weight_decay=0.0)
    assert (tuned.steps(clean), Annealed(epochs=1, min_steps=7).steps(clean)) == (4, 7)
    tuned.annealed(model, clean, ctx, objective)
    moves = [a - b for a, b in pairwise(rates)]
    assert moves == pytest.approx([cosine(0.0), cosine(0.25), cosine(0.5)], rel=1e-4)
    assert ctx.fit is fit
