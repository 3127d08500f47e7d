"""ℓ∞, ℓ2 and SSIM."""

from __future__ import annotations

import math

import pytest
import torch
from toys import seeded

from fl_sim.similarity import distances, ssim


def pair(side: int = 16, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(2, channels, side, side, generator=seeded(1))
    return x, (x + 0.2 * torch.rand(x.shape, generator=seeded(2))).clamp(0, 1)


def test_an_image_is_perfectly_similar_to_itself() -> None:
    x, _ = pair()
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    assert distances(x, x) == {"linf": 0.0, "l2": 0.0, "ssim": pytest.approx(1.0)}


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (0.2, 0.8), (0.0, 1.0)])
def test_ssim_of_flat_images_is_its_brightness_term(a: float, b: float) -> None:
    """Without variance the second factor is c₂/c₂ = 1: (2ab + c₁)/(a² + b² + c₁) is left, with c₁ = 0.0001."""
    x, y = torch.full((1, 1, 12, 12), a), torch.full((1, 1, 12, 12), b)
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert float(ssim(x, y)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("side", [8, 11, 14])
def test_ssim_is_wangs_formula_place_by_place(side: int) -> None:
    """Written out with loops: weighted means, variances and covariance under each window that fits."""
    x, y = (images[:1, :1].double() for images in pair(side))
    window = 11 if side >= 11 else 7
    half, values = window // 2, []
    weights = {(i, j): math.exp(-(i * i + j * j) / 4.5) for i in range(-half, half + 1) for j in range(-half, half + 1)}
    total = sum(weights.values())
    for row in range(half, side - half):
        for column in range(half, side - half):
            a = {at: (w / total, x[0, 0, row + at[0], column + at[1]].item()) for at, w in weights.items()}
            b = {at: y[0, 0, row + at[0], column + at[1]].item() for at in weights}
            ma, mb = sum(w * v for w, v in a.values()), sum(a[at][0] * b[at] for at in a)
            va = sum(w * (v - ma) ** 2 for w, v in a.values())
            vb = sum(a[at][0] * (b[at] - mb) ** 2 for at in a)
            vab = sum(a[at][0] * (a[at][1] - ma) * (b[at] - mb) for at in a)
            values.append((2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    assert float(ssim(x, y)) == pytest.approx(sum(values) / len(values), rel=1e-9)


def test_ssim_agrees_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    x, y = pair(24)
    expected = metrics.structural_similarity(
        x[0].double().numpy(),
        y[0].double().numpy(),
        channel_axis=0,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert float(ssim(x.double(), y.double())[0]) == pytest.approx(expected, abs=1e-6)


def test_distances_are_means_over_images() -> None:
    """One image moves by 0.5 in one pixel (ℓ∞ = ℓ2 = 0.5), the other by 0.1 in four (0.1 and 0.2)."""
    x = torch.zeros(2, 1, 8, 8)
    y = x.clone()
    y[0, 0, 0, 0] = 0.5
    y[1, 0, :2, :2] = 0.1
    found = distances(x, y)
    assert (found["linf"], found["l2"]) == (pytest.approx(0.3), pytest.approx(0.35))
