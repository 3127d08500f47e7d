"""Trigger inversion, against naive loops, numbers worked out by hand and a model with a real backdoor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import seeded, small_model, spotted, weights_of
from victim import victim

from fl_sim.errors import ConfigError
from fl_sim.inversion import Inversion, Inverted, Stamp, adapted, anomaly_index
from fl_sim.samples import to_pixels


def test_a_stamp_is_the_papers_mixture() -> None:
    """(1 − m)·x + m·p pixel by pixel: mask 0 leaves 0.2, mask 1 gives the pattern's 0.8, mask 0.25 gives 0.35."""
    mask = torch.tensor([[[0.0, 1.0, 0.25]]])
    stamped = Stamp(mask, torch.full((2, 1, 3), 0.8))(torch.full((5, 2, 1, 3), 0.2))
    torch.testing.assert_close(stamped, torch.tensor([0.2, 0.8, 0.35]).expand(5, 2, 1, 3))


def test_anomaly_index_by_hand() -> None:
    """Median of 1, 9, 10, 11, 12 is 10; gaps 9, 1, 0, 1, 2 have the median 1: the first is 9/1.4826 deviations out."""
    index = anomaly_index(torch.tensor([1.0, 9, 10, 11, 12]))
    torch.testing.assert_close(index, torch.tensor([9.0, 1, 0, 1, 2]) / 1.4826)


def test_only_small_masks_are_suspect() -> None:
    """Norms 1 and 30 are both outliers among tens, but a backdoor's mask is small, not large."""
    norms = [9.0, 10, 30, 1, 10, 11, 10]
    masks = torch.tensor(norms)[:, None, None, None]
    found = Inverted(masks, masks, torch.ones(7))
    assert found.anomalous(2.0) == [3]
    assert found.suspect == 3
    assert found.anomalous(1e6) == []


def test_equal_masks_are_no_anomaly() -> None:
    """Where all norms agree there is no deviation to divide by: every index is 0, not NaN."""
    assert torch.equal(anomaly_index(torch.full((6,), 4.0)), torch.zeros(6))


def test_the_cost_follows_a_naive_loop() -> None:
    """λ per class, counted out one class at a time: up by 2 after 3 successes, down by 2^1.5 after 3 failures."""
    outcomes = torch.rand(60, 4, generator=seeded()) < torch.tensor([0.1, 0.5, 0.9, 1.0])
    cost, ups, downs = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    naive, up, down = [0.0] * 4, [0] * 4, [0] * 4
    for reached in outcomes:
        cost, ups, downs = adapted(cost, ups, downs, reached, first=1e-3, factor=2.0, patience=3)
        for k, success in enumerate(reached.tolist()):
            up[k], down[k] = (up[k] + 1, 0) if success else (0, down[k] + 1)
            if up[k] == 3:
                naive[k], up[k] = (naive[k] * 2 if naive[k] else 1e-3), 0
            if down[k] == 3:
                naive[k], down[k] = naive[k] / 2**1.5, 0
        torch.testing.assert_close(cost, torch.tensor(naive))
    assert naive[3] == pytest.approx(1e-3 * 2**19)  # 60 successes are 20 rises, of which the first sets λ


@pytest.mark.slow
def test_it_finds_the_backdoor() -> None:
    """The victim's trigger is a 2×2 patch in the lower right corner towards class 0: that class needs a mask of fewer
    than its four pixels' sum, nearly all of it there, and the others need much more."""
    v = victim()
    for seed in range(2):
        found = Inversion().invert(v.model, v.clean, 10, seeded(seed))
        assert found.suspect == 0
        assert float(found.norms[0]) < 4
        assert float(found.norms[1:].min()) > 2 * float(found.norms[0])
        assert float(found.masks[0, 0, 5:, 5:].sum()) > 0.9 * float(found.norms[0])
        pixels = to_pixels(v.test.images)
        with torch.no_grad():
            taken = (v.model(found.stamp(0)(pixels)).argmax(1) == 0).float().mean()
        assert float(taken) > 0.8


def test_the_reported_success_is_measured_on_all_samples() -> None:
    v = victim()
    found = Inversion(steps=30).invert(v.model, v.clean, 10, seeded())
    pixels = to_pixels(v.clean.images)
    with torch.no_grad():
        shares = [(v.model(found.stamp(t)(pixels)).argmax(1) == t).float().mean() for t in range(10)]
    torch.testing.assert_close(found.success, torch.stack(shares))


def test_the_model_is_left_alone_and_the_seed_decides() -> None:
    model, samples = small_model().train(), spotted(24)
    before = weights_of(model)
    first = Inversion(steps=8).invert(model, samples, 4, seeded(1))
    assert torch.equal(weights_of(model), before)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    torch.manual_seed(5)
    assert torch.equal(first.masks, Inversion(steps=8).invert(model, samples, 4, seeded(1)).masks)
    assert not torch.equal(first.masks, Inversion(steps=8).invert(model, samples, 4, seeded(2)).masks)


def test_values_stay_pixels() -> None:
    found = Inversion(steps=20, lr=5.0).invert(small_model(), spotted(24), 4, seeded())
    assert found.masks.shape == (4, 1, 8, 8)
    assert found.patterns.shape == (4, 1, 8, 8)
    for values in (found.masks, found.patterns):
        assert float(values.min()) >= 0
        assert float(values.max()) <= 1


@pytest.mark.parametrize(
    "knobs",
    [{"steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"success": 0.0}, {"cost": 0.0}, {"factor": 1.0}, {"patience": 0}],
)
def test_impossible_settings_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Inversion(**knobs)
    assert caught.value.key == next(iter(knobs))
