"""The further robust rules, against numbers worked out by hand, limit cases and plainer rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from toys import seeded, server_context, small_model, spotted

from defenses.aggregation import clustering, deepsight, flare, fldetector, fltrust, foolsgold, indicator, rflbat
from defenses.aggregation.bucketing import Bucketing
from defenses.aggregation.bulyan import Bulyan, around_median, pick
from defenses.aggregation.centered_clipping import CenteredClipping
from defenses.aggregation.crfl import Crfl
from defenses.aggregation.dnc import Dnc, outlier_scores
from defenses.aggregation.flame import Flame, shifted
from defenses.aggregation.flower import FlowerStrategy, names
from defenses.aggregation.geometric_median import GeometricMedian
from defenses.aggregation.geometry import column_parts, cosines_of, gram, some_columns, squared_distances
from defenses.aggregation.krum import Krum, MultiKrum, krum_scores
from defenses.aggregation.local_models import global_model, head_columns, local_models, outputs, representations
from defenses.aggregation.mean import Mean
from defenses.aggregation.median import Median
from defenses.aggregation.norm_clipping import NormClipping
from defenses.aggregation.rlr import Rlr
from defenses.aggregation.signguard import SignGuard, sign_shares
from defenses.aggregation.trimmed_mean import TrimmedMean
from defenses.aggregation.weak_dp import WeakDp
from fl_sim.errors import ConfigError, RunError
from fl_sim.layout import Layout
from fl_sim.protocols import Aggregate, Aggregator, ServerContext, State
from fl_sim.training import fit, sgd

PARAMETERS = Layout.of(small_model()).parameters


def context(clients: int, attackers: int = 1, seed: int = 0) -> ServerContext:
    return server_context(small_model(), spotted(24), seed, clients=clients, assumed_attackers=attackers)


def aggregate(
    rule: Aggregator, deltas: Tensor, weights: Tensor | None = None, attackers: int = 1, state: State | None = None
) -> Aggregate:
    given = torch.full((len(deltas),), 1 / len(deltas)) if weights is None else weights
    return rule.aggregate(deltas, given, state or {}, context(len(deltas), attackers))


def kept(result: Aggregate) -> list[bool]:
    assert result.kept is not None
    return [bool(keep) for keep in result.kept]


def draws(rows: int = 7, columns: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=seeded(seed))


def shares(rows: int = 7) -> Tensor:
    weights = torch.rand(rows, generator=seeded(9)) + 0.1
    return weights / weights.sum()


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def equal_to_mean(rule: Aggregator, deltas: Tensor | None = None) -> None:
    deltas = draws() if deltas is None else deltas
    weights = shares(len(deltas))
    expected = aggregate(Mean(), deltas, weights).delta
    torch.testing.assert_close(aggregate(rule, deltas, weights).delta, expected, atol=1e-6, rtol=1e-4)


# Geometry and clusters ------------------------------------------------------------------------------------------------


def test_inner_products_are_summed_over_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 columns in parts of 3: the same products as in one go, in double precision."""
    monkeypatch.setattr("defenses.aggregation.geometry.ENTRIES", 21)
    assert [part.shape[1] for part in column_parts(draws())] == [3] * 16 + [2]
    torch.testing.assert_close(gram(draws()), draws().double() @ draws().double().T)


def test_distances_and_cosines_by_hand() -> None:
    """(3, 4), (0, 0), (4, −3): distances² 25, 50, 25; the first and last at right angles, zero to everyone."""
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [4.0, -3.0]])
    assert squared_distances(rows).tolist() == [[0, 25, 50], [25, 0, 25], [50, 25, 0]]
    assert cosines_of(gram(rows)).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_columns_are_drawn_without_repeats() -> None:
    drawn = some_columns(1000, 100, seeded())
    assert 80 < len(drawn) <= 100
    assert len(drawn.unique()) == len(drawn)
    assert some_columns(5, 9, seeded()).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("blobs", [1, 2, 3])
def test_the_gap_statistic_counts_clusters(blobs: int) -> None:
    """Squares of 20 even points, ten of their widths apart; and as many labels as squares from k-means."""
    centres = np.array([[0.0, 0], [10, 0], [0, 10]])[:blobs]
    points = (torch.rand(blobs, 20, 2, generator=seeded(3)).numpy() + centres[:, None]).reshape(-1, 2)
    assert clustering.cluster_count(points, 8, seeded()) == blobs
    labels = clustering.k_means(points, blobs, seeded())
    assert all(len(set(part)) == 1 for part in np.split(labels, blobs))


def test_clusterings_of_nothing_much() -> None:
    """One point, and copies of one point, are one cluster; the largest cluster ignores outliers."""
    for count in (1, 2, 5):
        same = np.ones((count, 2))
        assert clustering.cluster_count(same, 8, seeded()) == 1
        assert set(clustering.mean_shift(same)) == {0}
        assert set(clustering.hdbscan(np.zeros((count, count)), count // 2 + 1, 1, single=True)) == {0}
    assert clustering.largest(np.array([-1, -1, -1, 0, 1, 1])).tolist() == [False] * 4 + [True] * 2
    assert not clustering.largest(np.array([-1, -1])).any()


def test_local_models_are_the_global_one_plus_updates() -> None:
    """Row by row, with the global batch statistics, and the head's columns are the last layer's parameters."""
    ctx, deltas = context(2), 0.1 * draws(2, PARAMETERS)
    weight, bias = head_columns(ctx)
    for delta, model in zip(deltas, local_models(deltas, ctx), strict=True):
        expected = ctx.vector.clone()
        expected[:PARAMETERS] += delta
        assert torch.equal(ctx.layout.read(model), expected)
        assert not model.training
        assert torch.equal(model.head.weight.flatten(), expected[weight])
        assert torch.equal(model.head.bias, expected[bias])


def test_representations_are_what_the_head_is_given() -> None:
    model, images = global_model(context(1)), spotted(8)
    torch.testing.assert_close(model.head(representations(model, images)), outputs(model, images.images))


# Geometric median -----------------------------------------------------------------------------------------------------


def test_geometric_median_by_hand() -> None:
    """On a line it is the median: of 0, 1, 10: 1. A weight above one half draws it to that point. Of a right triangle
    with legs 1 and 1 it is the Fermat point (t, t), where the legs are seen at 120°: t = (3 − √3)/6 = 0.2113."""
    assert aggregate(GeometricMedian(), column(0, 1, 10)).delta.tolist() == pytest.approx([1.0], abs=1e-3)
    heavy = aggregate(GeometricMedian(), column(0, 1, 10), torch.tensor([0.2, 0.2, 0.6]))
    assert heavy.delta.tolist() == pytest.approx([10.0], abs=1e-2)
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    fermat = (3 - math.sqrt(3)) / 6
    assert aggregate(GeometricMedian(), triangle).delta.tolist() == pytest.approx([fermat, fermat], abs=1e-5)


def test_geometric_median_without_iterations_is_the_mean() -> None:
    equal_to_mean(GeometricMedian(iterations=0))


@pytest.mark.parametrize("huge", [1e6, 1e12, 1e17])
def test_geometric_median_holds_against_a_huge_update(huge: float) -> None:
    """The mean lies 1.4e5 away and farther; the point found stays within the six others' range."""
    deltas = 1 + 0.01 * draws()
    deltas[3] = huge
    assert (aggregate(GeometricMedian(), deltas).delta - 1).abs().max() < 0.05


# Bulyan ---------------------------------------------------------------------------------------------------------------


def test_values_around_the_median_by_hand() -> None:
    """0, 1, 3, 9, 10: the three closest to 3 are 3, 1, 0, of mean 4/3. 0, 1, 2, 10: median 1.5, closest 1 and 2."""
    assert around_median(column(0, 1, 3, 9, 10), [0, 1, 2, 3, 4], 3).tolist() == pytest.approx([4 / 3])
    assert around_median(column(0, 1, 2, 10), [0, 1, 2, 3], 2).tolist() == pytest.approx([1.5])


def test_bulyan_picks_by_krum_again_and_again() -> None:
    """The loop: the best Krum score among those left, with Krum's own scores of just those."""
    deltas, left, expected = draws(11), list(range(11)), list[int]()
    while len(expected) < 7:
        best = left[int(krum_scores(deltas[left], 2).argmin())]
        expected.append(best)
        left.remove(best)
    assert pick(squared_distances(deltas), 7, 2) == expected
    result = aggregate(Bulyan(), deltas, attackers=2)
    assert [i for i, keep in enumerate(kept(result)) if keep] == sorted(expected)
    torch.testing.assert_close(result.delta, around_median(deltas, expected, 3))


def test_bulyan_without_attackers_is_the_plain_mean() -> None:
    """θ = n are picked and all n values averaged."""
    result = aggregate(Bulyan(attackers=0), draws())
    torch.testing.assert_close(result.delta, draws().mean(0))
    assert all(kept(result))


def test_bulyan_leaves_out_the_outlier() -> None:
    deltas = 1 + 0.01 * draws()
    deltas[3] = 1e6
    result = aggregate(Bulyan(), deltas)
    assert (result.delta - 1).abs().max() < 0.05
    assert not kept(result)[3]


# Clipping and noise ---------------------------------------------------------------------------------------------------


def test_weak_dp_without_noise_is_norm_clipping() -> None:
    expected = aggregate(NormClipping(2.0), draws(), shares()).delta
    assert torch.equal(aggregate(WeakDp(2.0, 0.0), draws(), shares()).delta, expected)


def test_weak_dp_adds_noise_of_the_stated_deviation() -> None:
    """Of 100,000 draws the standard deviation is 0.5 within 0.5/√(2·10⁵) = 0.0011, here four times that."""
    noise = aggregate(WeakDp(1.0, 0.5), torch.zeros(2, 100_000)).delta
    assert float(noise.std()) == pytest.approx(0.5, abs=0.0045)
    assert abs(float(noise.mean())) < 0.0065


def test_crfl_by_hand() -> None:
    """w = (3, 4), Δ̄ = (3, 4): (6, 8) has length 10; ρ = 2 + 3·1 = 5 halves it to (3, 4): no step at all."""
    ctx = replace(context(2), vector=torch.tensor([3.0, 4.0]))
    deltas, weights = torch.tensor([[2.0, 4.0], [4.0, 4.0]]), torch.tensor([0.5, 0.5])
    assert Crfl(2.0, 3.0, 0.0).aggregate(deltas, weights, {}, ctx).delta.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert Crfl(2.0, 8.0, 0.0).aggregate(deltas, weights, {}, ctx).delta.tolist() == [3.0, 4.0]
    noise = Crfl(1e9, 0.0, 0.25).aggregate(torch.zeros(2, PARAMETERS), weights, {}, context(2)).delta
    assert float(noise.std()) == pytest.approx(0.25, rel=0.06)


def test_centered_clipping_by_hand() -> None:
    """(3, 4) is cut to (0.6, 0.8), (0, 0.5) stays: v = (0.3, 0.65). On a line with updates of 10 and τ = 1, v is 1,
    then 2 in the next round; two iterations in one round do the same."""
    first = aggregate(CenteredClipping(1.0), torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
    assert first.delta.tolist() == pytest.approx([0.3, 0.65])
    one = aggregate(CenteredClipping(1.0), column(10, 10))
    assert one.delta.tolist() == pytest.approx([1.0])
    assert aggregate(CenteredClipping(1.0), column(10, 10), state=one.state).delta.tolist() == pytest.approx([2.0])
    assert aggregate(CenteredClipping(1.0, 2), column(10, 10)).delta.tolist() == pytest.approx([2.0])


def test_centered_clipping_that_clips_nothing_is_the_mean() -> None:
    equal_to_mean(CenteredClipping(1e9))


# FoolsGold and FLTrust ------------------------------------------------------------------------------------------------


def test_foolsgold_trust_by_hand() -> None:
    """Two copies and one at right angles: α = (0, 0, 1). Two of cosine 0.55: α = 0.45, ln(0.45/0.55) + 0.5 = 0.2993."""
    copies = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert foolsgold.trust(copies).tolist() == [0.0, 0.0, 1.0]
    alike = torch.tensor([[1.0, 0.55, 0.0], [0.55, 1.0, 0.0], [0.0, 0.0, 1.0]])
    value = math.log(0.45 / 0.55) + 0.5
    assert foolsgold.trust(alike).tolist() == pytest.approx([value, value, 1.0], abs=1e-5)


def test_foolsgold_pardons() -> None:
    """cos₁₂ = 0.6, cos₁₃ = 0.55, cos₂₃ = 0: v = (0.6, 0.6, 0.55). For 3: 0.55 · 0.55/0.6 = 0.5042, so α = (0.4, 0.4,
    0.4958); divided by the largest: (0.8067, 0.8067, 0.99), whose logits + 0.5 are above 1: all trusted."""
    cosines = torch.tensor([[1.0, 0.6, 0.55], [0.6, 1.0, 0.0], [0.55, 0.0, 1.0]])
    assert foolsgold.trust(cosines).tolist() == [1.0, 1.0, 1.0]
    # With a fourth at right angles the largest is 1: logit(0.4) + 0.5 = 0.0945, logit(0.495833) + 0.5 = 0.4833.
    four = torch.eye(4)
    four[:3, :3] = cosines
    assert foolsgold.trust(four).tolist() == pytest.approx([0.0945, 0.0945, 0.4833, 1.0], abs=1e-3)


def test_foolsgold_rejects_sybils_and_sums_histories() -> None:
    """Two clients send the same and are dropped; the others' weighted mean stays. Histories go by client id and add
    up, also over rounds in which a client was absent."""
    deltas = draws(5, PARAMETERS)
    deltas[4] = deltas[3]
    first = aggregate(foolsgold.FoolsGold("all"), deltas, shares(5))
    assert kept(first) == [True, True, True, False, False]
    expected = shares(5)[:3] / shares(5)[:3].sum() @ deltas[:3]
    torch.testing.assert_close(first.delta, expected, atol=1e-5, rtol=1e-5)
    ctx = replace(context(2), clients=(1, 7))
    second = foolsgold.FoolsGold("all").aggregate(deltas[:2], torch.tensor([0.5, 0.5]), first.state, ctx)
    assert torch.equal(torch.as_tensor(second.state["history 1"]), deltas[1] + deltas[0])
    assert torch.equal(torch.as_tensor(second.state["history 0"]), deltas[0])
    assert torch.equal(torch.as_tensor(second.state["history 7"]), deltas[1])


def test_foolsgold_looks_at_the_head_by_default() -> None:
    """Updates that differ everywhere but in the last layer are copies to it."""
    deltas = draws(3, PARAMETERS)
    for part in head_columns(context(3)):
        deltas[1, part] = deltas[0, part]
    assert kept(aggregate(foolsgold.FoolsGold(), deltas)) == [False, False, True]
    assert all(kept(aggregate(foolsgold.FoolsGold("all"), deltas)))


@dataclass(frozen=True)
class Rooted(fltrust.FlTrust):
    """FLTrust whose root update is (2, 0)."""

    def root(self, ctx: ServerContext) -> Tensor:
        return torch.tensor([2.0, 0.0])


def test_fltrust_by_hand() -> None:
    """Root (2, 0): (0, 5) and (−1, 0) get no trust, (3, 4) gets 0.6 and is scaled by 2/5 to (1.2, 1.6), (1, 0) gets 1
    and becomes (2, 0): (0.6 · (1.2, 1.6) + (2, 0))/1.6 = (1.7, 0.6)."""
    deltas = torch.tensor([[0.0, 5.0], [-1.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    result = aggregate(Rooted(), deltas)
    assert result.delta.tolist() == pytest.approx([1.7, 0.6])
    assert kept(result) == [False, False, True, True]
    nobody = aggregate(Rooted(), deltas[:2])
    assert nobody.delta.tolist() == [0.0, 0.0]
    assert kept(nobody) == [False, False]


def test_fltrust_really_trains_its_root() -> None:
    """The root's update is the change of a model trained from the global one on the clean set with the same draws; as
    the only client, an update that equals it is its own aggregate."""
    ctx, model = context(1), small_model()
    assert ctx.clean is not None
    fit(model, ctx.clean, sgd(model, 0.05, momentum=0.9), epochs=3, batch_size=8, rng=seeded())
    expected = (ctx.layout.read(model) - ctx.vector)[:PARAMETERS]
    rule = fltrust.FlTrust(epochs=3, batch_size=8, lr=0.05, momentum=0.9)
    assert torch.equal(rule.root(ctx), expected)
    assert expected.norm() > 0.1
    torch.testing.assert_close(rule.aggregate(expected[None], torch.ones(1), {}, context(1)).delta, expected)
    opposed = rule.aggregate(-expected[None], torch.ones(1), {}, context(1))
    assert not opposed.delta.any()


# Clusters of clients --------------------------------------------------------------------------------------------------


def test_flame_by_hand() -> None:
    """Lengths 1, 2, 3, 4 in one direction and 9 in the opposite: the first four are the majority, the median length 3:
    (1 + 2 + 3 + 3)/4 = 2.25."""
    result = aggregate(Flame(noise=0.0, compare="updates"), torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0], [-9, 0]]))
    assert kept(result) == [True] * 4 + [False]
    assert result.delta.tolist() == pytest.approx([2.25, 0.0])


def test_flame_noise_is_relative_to_the_median_length() -> None:
    """Copies of one update of length 7 with λ = 0.1: noise of deviation 0.7 around it."""
    delta = torch.nn.functional.normalize(draws(1, PARAMETERS)) * 7
    result = aggregate(Flame(noise=0.1), delta.repeat(3, 1))
    assert float((result.delta - delta[0]).std()) == pytest.approx(0.7, rel=0.06)


def test_flame_compares_models_without_making_them() -> None:
    origin, deltas = draws(1, seed=3)[0], draws()
    torch.testing.assert_close(shifted(gram(deltas), deltas, origin), gram(deltas + origin), atol=1e-4, rtol=1e-5)


def test_rlr_by_hand() -> None:
    """Five clients, θ = 0.6 · 5 = 3: four against one outvote by 3, three against two by 1 only, which turns the mean
    (1 + 1 + 1 − 1 − 1)/5 = 0.2 round. Zeros do not vote: three of five are 3."""
    deltas = torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 1, 1], [1, -1, 0], [-1, -1, 0]])
    assert aggregate(Rlr(0.6), deltas).delta.tolist() == pytest.approx([0.6, -0.2, 0.6])


def test_rlr_without_a_threshold_is_the_mean() -> None:
    equal_to_mean(Rlr(0.0))


def test_sign_shares_by_hand() -> None:
    rows = torch.tensor([[1.0, 2, 0, -1], [-1, -1, -1, -1]])
    assert sign_shares(rows).tolist() == [[0.5, 0.25, 0.25], [0, 0, 1]]


def test_signguard_filters_by_length() -> None:
    """Copies of lengths 1, 1, 1, 50 and 0.01: median 1, so the last two are out and the rest is the copy itself."""
    unit = torch.nn.functional.normalize(draws(1))
    result = aggregate(SignGuard(share=1.0), unit * column(1, 1, 1, 50, 0.01))
    assert kept(result) == [True, True, True, False, False]
    torch.testing.assert_close(result.delta, unit[0])


def test_signguard_filters_by_signs() -> None:
    """Six of mixed signs, two of negative ones only, all about as long."""
    deltas = draws(8, 2000)
    deltas[6:] = -deltas[6:].abs()
    result = aggregate(SignGuard(), deltas)
    assert kept(result)[6:] == [False, False]
    assert sum(kept(result)) >= 3


def test_dnc_by_hand() -> None:
    """0, 1, 2, 10 lie 3.25, 2.25, 1.25 and 6.75 off their mean: the squares are the scores; f = 1 drops 10."""
    line = column(0, 1, 2, 10)
    assert outlier_scores(line).tolist() == pytest.approx([10.5625, 5.0625, 1.5625, 45.5625])
    result = aggregate(Dnc(), line)
    assert kept(result) == [True, True, True, False]
    assert result.delta.tolist() == pytest.approx([1.0])


def test_dnc_scores_are_the_singular_vectors() -> None:
    """Against the definition: centre, project on the first right singular vector, square."""
    centred = draws() - draws().mean(0)
    vector = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    torch.testing.assert_close(outlier_scores(draws()).float(), (centred @ vector).square(), atol=1e-4, rtol=1e-4)


def test_dnc_without_attackers_is_the_mean() -> None:
    equal_to_mean(Dnc(attackers=0))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_buckets_of_means_give_the_mean(size: int) -> None:
    equal_to_mean(Bucketing(size, Mean()))


def test_bucketing_hands_over_means_and_maps_the_kept_back() -> None:
    """Buckets of one are the rule itself; one bucket of all is the mean for every rule. Six clients in pairs and one
    supposed attacker: multi-Krum keeps two of three pairs, without the attacker's."""
    torch.testing.assert_close(aggregate(Bucketing(1, Median()), draws()).delta, aggregate(Median(), draws()).delta)
    equal_to_mean(Bucketing(7, Median()))
    deltas = draws(6)
    deltas[2] = 1e3
    result = aggregate(Bucketing(2, MultiKrum()), deltas)
    assert sum(kept(result)) == 4
    assert not kept(result)[2]
    torch.testing.assert_close(result.delta, deltas[torch.tensor(kept(result))].mean(0), atol=1e-5, rtol=1e-5)
    assert Bucketing(2, fltrust.FlTrust()).needs_clean
    assert not Bucketing(2, Krum()).needs_clean


def test_rflbats_plane_is_that_of_a_principal_component_analysis() -> None:
    ours, theirs = rflbat.plane(gram(draws()).numpy()), PCA(2).fit_transform(draws().numpy())
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-4)


def test_rflbats_filters_by_hand() -> None:
    """0, 1, 2, 100 on a line: sums of distances 103, 101, 101, 297, median 102. Clusters {0, 1} of cosine 0.9, {2, 3}
    of 0.2 and {4}: the second is the least alike, and one alone is never kept."""
    points = np.array([[0.0, 0], [1, 0], [2, 0], [100, 0]])
    assert rflbat.near(points, 2.0).tolist() == [True, True, True, False]
    assert rflbat.near(points, 3.0).all()
    cosines = np.eye(5)
    cosines[0, 1] = cosines[1, 0] = 0.9
    cosines[2, 3] = cosines[3, 2] = 0.2
    assert rflbat.least_alike(np.array([0, 0, 1, 1, 2]), cosines).tolist() == [False, False, True, True, False]
    assert rflbat.least_alike(np.arange(3), np.eye(3)).all()


def test_rflbat_rejects_colluders() -> None:
    """Four of ten send nearly the same, far off: they form the more alike of two clusters."""
    deltas = draws(10, 200)
    deltas[6:] = 3 * draws(1, 200, 5) + 0.1 * draws(4, 200, 6)
    result = aggregate(rflbat.Rflbat(), deltas, shares(10))
    assert kept(result)[6:] == [False] * 4
    assert sum(kept(result)) >= 3
    torch.testing.assert_close(
        result.delta,
        aggregate(MultiKrum(keep=99), deltas[torch.tensor(kept(result))], shares(10)[torch.tensor(kept(result))]).delta,
    )


# Rules that look into models ------------------------------------------------------------------------------------------


def test_flare_votes_by_hand() -> None:
    """Four clients vote for two each, the nearest. 0: 1, 2; 1: 0, 2; 2: 1, 0; 3: 2, 1. Counts 2, 3, 3, 0."""
    at = torch.tensor([0.0, 1.0, 2.5, 10.0])
    assert flare.votes((at[:, None] - at).abs()).tolist() == [2, 3, 3, 0]
    assert flare.votes(torch.zeros(1, 1)).tolist() == [1]


def test_discrepancies_are_the_naive_ones() -> None:
    """MMD² = mean k(x, x') + mean k(y, y') − 2 mean k(x, y), without a sample's kernel with itself."""
    seen, size = draws(3, 5 * 4).view(3, 5, 4), 5

    def kernel(x: Tensor, y: Tensor) -> float:
        return math.exp(-float((x - y).square().sum()) / 4)

    def within(x: Tensor) -> float:
        return sum(kernel(x[i], x[j]) for i in range(size) for j in range(size) if i != j) / (size * (size - 1))

    found = flare.discrepancies(seen)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        across = sum(kernel(x, y) for x in seen[a] for y in seen[b]) / size**2
        expected = within(seen[a]) + within(seen[b]) - 2 * across
        assert float(found[a, b]) == pytest.approx(expected, abs=1e-5)
        assert float(found[b, a]) == pytest.approx(expected, abs=1e-5)


def test_flare_distrusts_the_model_that_sees_otherwise() -> None:
    """Six slight changes and one that scrambles the model: nobody votes for it, and its weight is e⁻ᶜ of the others',
    c their votes over the mean count. At a high temperature all weigh the same."""
    deltas = 0.001 * draws(7, PARAMETERS)
    deltas[2] = 0.5 * draws(1, PARAMETERS, 5)[0]
    assert kept(aggregate(flare.Flare(20), deltas)) == [True, True, False, True, True, True, True]
    even = aggregate(flare.Flare(20, 1e9), deltas)
    torch.testing.assert_close(even.delta, deltas.mean(0), atol=1e-6, rtol=1e-4)


def test_deepsights_energies_by_hand() -> None:
    """Class energies (1 + 1 + 1, 0) squared: all in one class. (3, 1): 0.9 and 0.1. (1, 1): one half each. With two
    classes a class counts from half the largest on: 1, 1 and 2 classes."""
    weights = torch.tensor([[[1.0, -1], [0, 0]], [[2, 0], [1, 0]], [[1, 0], [0, -1]]])
    biases = torch.tensor([[1.0, 0], [-1, 0], [0, 0]])
    neups = deepsight.energies(weights, biases)
    torch.testing.assert_close(neups, torch.tensor([[1.0, 0], [0.9, 0.1], [0.5, 0.5]]))
    assert deepsight.exceedings(neups).tolist() == [1, 1, 2]


def test_deepsights_clusters_by_hand() -> None:
    """Outliers are apart from all, each other too. A cluster with a third of suspicious members goes, one with none
    stays; of the outliers the suspicious goes."""
    assert deepsight.apart(np.array([0, 0, -1, -1])).tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [1, 1, 0, 1],
        [1, 1, 1, 0],
    ]
    suspicious = torch.tensor([True, False, False, False, False, True, False])
    labels = np.array([0, 0, 0, 1, 1, -1, -1])
    assert deepsight.accepted(labels, suspicious, 1 / 3).tolist() == [False] * 3 + [True, True, False, True]


def test_deepsights_divisions() -> None:
    """No update, no difference: every quotient is 1. Raising one bias by ln 2 multiplies that class's probability by
    2/(1 + p), with p what it had."""
    ctx = context(2)
    deltas = torch.zeros(2, PARAMETERS)
    deltas[1, head_columns(ctx)[1]] = torch.tensor([math.log(2), 0, 0, 0])
    found = deepsight.divisions(deltas, ctx, 50)
    torch.testing.assert_close(found[0], torch.ones(4))
    had = outputs(global_model(ctx), torch.rand(50, 1, 8, 8, generator=seeded())).softmax(1)[:, 0]
    assert float(found[1, 0]) == pytest.approx(float((2 / (1 + had)).mean()), rel=1e-4)


def test_deepsight_rejects_who_trained_for_one_class() -> None:
    """Seven clients change all classes, three colluders only one: their energy exceeds the threshold once, not four
    times, and half the median of four is two."""
    deltas = 0.01 * draws(10, PARAMETERS)
    weight, bias = head_columns(context(10))
    deltas[7:] = 0.002 * draws(3, PARAMETERS, 5)
    deltas[7:, weight] = 0
    deltas[7:, bias] = torch.tensor([1.0, 0, 0, 0])
    result = aggregate(deepsight.DeepSight(samples=60), deltas)
    assert kept(result) == [True] * 7 + [False] * 3


def test_the_hessian_product_meets_the_secant_condition() -> None:
    """BFGS maps the last step onto the last change. After as many conjugate steps as a quadratic has dimensions it is
    the Hessian: diag(1, 2, 5) from steps along the axes."""
    steps, changes = draws(4), draws(4, seed=1) + 2 * draws(4)
    torch.testing.assert_close(fldetector.hessian_product(steps, changes, steps[-1]), changes[-1], atol=1e-3, rtol=1e-3)
    hessian = torch.diag(torch.tensor([1.0, 2, 5]))
    found = fldetector.hessian_product(torch.eye(3), hessian, torch.tensor([1.0, -2, 3]))
    assert found.tolist() == pytest.approx([1.0, -4.0, 15.0], abs=1e-4)


def test_fldetector_finds_who_cannot_be_foretold() -> None:
    """Honest updates are a linear function of the model, Δ_k = −A(w − w_k), which L-BFGS learns; two of eight send
    fresh noise as long as those. Before the window is full all are kept, and the rule is the mean."""
    rule, state = fldetector.FlDetector(window=4), dict[str, Any]()
    curvature = torch.linspace(0.1, 0.5, PARAMETERS)
    optima, vector = draws(8, PARAMETERS), context(8).vector
    for round_ in range(1, 9):
        deltas = -curvature * (vector[:PARAMETERS] - optima)
        deltas[6:] = 0.3 * draws(2, PARAMETERS, 100 + round_)
        ctx = replace(context(8), vector=vector, round=round_)
        result = rule.aggregate(deltas, torch.full((8,), 0.125), state, ctx)
        if round_ <= 4:
            assert all(kept(result))
            torch.testing.assert_close(result.delta, deltas.mean(0), atol=1e-6, rtol=1e-4)
        state, vector = dict(result.state), vector.clone()
        vector[:PARAMETERS] += result.delta
    assert kept(result) == [True] * 6 + [False] * 2


def test_the_indicator_is_planted_and_found() -> None:
    """After a step of no updates the model knows its task. Then a client that leaves the model alone still knows it and
    is rejected, and one that turns the head's signs round has forgotten it."""
    rule, ctx = indicator.Indicator(samples=24, epochs=60, batch_size=8, lr=0.05, mu=0.0), context(3)
    first = rule.aggregate(torch.zeros(3, PARAMETERS), torch.full((3,), 1 / 3), {}, ctx)
    assert all(kept(first))
    vector = ctx.vector.clone()
    vector[:PARAMETERS] += first.delta
    deltas = torch.zeros(3, PARAMETERS)
    planted = replace(context(3), vector=vector)
    forget = torch.zeros(PARAMETERS)
    weight, bias = head_columns(ctx)
    forget[weight] = -2 * vector[weight]
    forget[bias] = -2 * vector[bias]
    deltas[1] = forget
    second = rule.aggregate(deltas, torch.full((3,), 1 / 3), first.state, planted)
    assert kept(second) == [False, True, False]
    assert second.state["seed"] == first.state["seed"]
    # Where the model sent out has lost the task, nobody can be judged.
    lost = replace(context(3), vector=vector + torch.nn.functional.pad(forget, (0, len(vector) - PARAMETERS)))
    assert all(kept(rule.aggregate(0 * deltas, torch.full((3,), 1 / 3), first.state, lost)))


def test_the_indicators_images_are_balanced_and_repeatable() -> None:
    rule, ctx = indicator.Indicator(samples=40), context(1)
    first, second = rule.task(5, (1, 8, 8), ctx), rule.task(5, (1, 8, 8), ctx)
    assert torch.equal(first.images, second.images)
    assert torch.bincount(first.labels).tolist() == [10] * 4
    assert first.images.shape == (40, 1, 8, 8)
    assert 0 <= float(first.images.min()) < float(first.images.max()) <= 1
    assert not torch.equal(first.images, rule.task(6, (1, 8, 8), ctx).images)


# Flower ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "options", "ours"),
    [
        ("FedAvg", {}, Mean()),
        ("FedMedian", {}, Median()),
        ("FedTrimmedAvg", {"beta": 0.2}, TrimmedMean(0.2)),
        ("Krum", {"num_malicious_nodes": 1}, Krum()),
        ("MultiKrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 6}, MultiKrum()),
    ],
)
def test_flowers_rules_are_ours(strategy: str, options: dict[str, Any], ours: Aggregator) -> None:
    """The same step from both, and the same clients kept."""
    deltas = draws(7, PARAMETERS)
    deltas[3] *= 10
    expected, found = (aggregate(rule, deltas, shares()) for rule in (ours, FlowerStrategy(strategy, options)))
    torch.testing.assert_close(found.delta, expected.delta, atol=1e-5, rtol=1e-4)
    assert (found.kept is None) == (expected.kept is None)
    assert found.kept is None or kept(found) == kept(expected)


def test_flowers_server_optimisers_remember() -> None:
    """FedAvgM with β = 0.5 on updates of 1: 1, then 0.5 + 1. FedAdam against its formula, with its bias correction."""
    ones, rule = torch.ones(2, PARAMETERS), FlowerStrategy("FedAvgM", {"server_momentum": 0.5})
    first = aggregate(rule, ones)
    second = aggregate(rule, ones, state=first.state)
    assert first.delta.tolist() == pytest.approx([1.0] * PARAMETERS)
    assert second.delta.tolist() == pytest.approx([1.5] * PARAMETERS)
    adam = FlowerStrategy("FedAdam", {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 0.001})
    m = v = 0.0
    state: State = {}
    for _ in range(2):
        m, v = 0.9 * m + 0.1, 0.99 * v + 0.01
        rate = 0.1 * math.sqrt(1 - 0.99**2) / (1 - 0.9**2)  # the context's round is 1
        result = aggregate(adam, ones, state=state)
        assert float(result.delta[0]) == pytest.approx(rate * m / (math.sqrt(v) + 0.001), rel=1e-4)
        state = result.state


def test_flowers_refusal_is_said_clearly() -> None:
    """Its Bulyan wants 4f + 3 replies."""
    with pytest.raises(RunError, match="Bulyan"):
        aggregate(FlowerStrategy("Bulyan", {"num_malicious_nodes": 3}), draws(7, PARAMETERS))
    assert {"FedAvg", "FedMedian", "Krum", "Bulyan", "FedAdam"} <= set(names())


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: GeometricMedian(smoothing=0.0), "smoothing"),
        (lambda: Bulyan(-1), "attackers"),
        (lambda: WeakDp(0.0), "max_norm"),
        (lambda: Crfl(base=0.0), "base"),
        (lambda: fltrust.FlTrust(epochs=0), "epochs"),
        (lambda: Flame(-1.0), "noise"),
        (lambda: deepsight.DeepSight(threshold=0.0), "threshold"),
        (lambda: Rlr(1.5), "threshold"),
        (lambda: fldetector.FlDetector(0), "window"),
        (lambda: SignGuard(high=0.5), "high"),
        (lambda: Dnc(coordinates=0), "coordinates"),
        (lambda: CenteredClipping(0.0), "radius"),
        (lambda: Bucketing(0), "size"),
        (lambda: Bucketing(2, 3), "rule"),  # type: ignore[arg-type]
        (lambda: rflbat.Rflbat(0.5), "first"),
        (lambda: flare.Flare(1), "samples"),
        (lambda: indicator.Indicator(threshold=0.0), "threshold"),
        (lambda: FlowerStrategy("FedNothing"), "strategy"),
        (lambda: FlowerStrategy("QFedAvg"), "strategy"),
        (lambda: FlowerStrategy("FedAvg", {"nonsense": 1}), "options"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Aggregator], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.key == key
