"""What every aggregation rule promises, for each file of the aggregator group."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from toys import seeded, server_context, small_model, spotted

from fl_sim.composing import conf_folder
from fl_sim.layout import Layout
from fl_sim.protocols import Aggregate, Aggregator, ServerContext, State
from fl_sim.schema import construct, locate

NAMES = sorted(path.stem for path in (conf_folder() / "aggregator").glob("*.yaml"))
SMALL: dict[str, dict[str, Any]] = {
    "deepsight": {"samples": 30, "draws": 2},
    "indicator": {"samples": 24, "epochs": 4},
    "weak_dp": {"noise": 0.0},
    "crfl": {"noise": 0.0, "base": 1e6},
    "flame": {"noise": 0.0},
}
"""Less work, and no noise nor clipping of the global model, so that equalities can be exact."""
PARAMETERS = Layout.of(small_model()).parameters
FRAGILE = {"mean", "norm_clipping"}
"""Rules that by nature can't do without a client."""
TRAINING = {"fltrust", "indicator"}
"""Rules whose step is not a mean of the updates, because the server trains."""
WEIGHTED = {
    *("mean", "krum", "multi_krum", "norm_clipping", "weak_dp", "crfl", "foolsgold", "flame", "deepsight", "rlr"),
    *("geometric_median", "fldetector", "signguard", "dnc", "centered_clipping", "bucketing", "rflbat", "indicator"),
}


def rule_of(name: str, **changes: Any) -> Aggregator:
    section: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "aggregator" / f"{name}.yaml"))
    rule: Aggregator = construct(locate(section["_target_"]), section | SMALL.get(name, {}) | changes)
    return rule


def context(clients: int, attackers: int = 1, round_: int = 1) -> ServerContext:
    ctx = server_context(small_model(), spotted(24), clients=clients, assumed_attackers=attackers)
    return replace(ctx, round=round_)


def draws(rows: int = 7, seed: int = 0) -> Tensor:
    """Updates of length below 1 with something in common."""
    rng = seeded(seed)
    return 0.005 * (torch.randn(PARAMETERS, generator=rng) + torch.randn(rows, PARAMETERS, generator=rng))


def even(rows: int) -> Tensor:
    return torch.full((rows,), 1 / rows)


def run(name: str, deltas: Tensor, weights: Tensor | None = None, attackers: int = 1) -> Aggregate:
    given = even(len(deltas)) if weights is None else weights
    return rule_of(name).aggregate(deltas, given, {}, context(len(deltas), attackers))


def sound(result: Aggregate, rows: int) -> None:
    assert result.delta.shape == (PARAMETERS,)
    assert result.delta.isfinite().all()
    if result.kept is not None:
        assert result.kept.dtype == torch.bool
        assert result.kept.shape == (rows,)
        assert result.kept.device == result.delta.device


def test_the_group_is_complete() -> None:
    assert len(NAMES) >= 24


@pytest.mark.parametrize("name", NAMES)
def test_one_client_alone_decides(name: str) -> None:
    """Nothing can be compared, so it is kept; FLTrust gives it the root's length, the indicator plants its task too."""
    delta = draws(1)
    result = run(name, delta)
    sound(result, 1)
    assert result.kept is None or result.kept.all() or name == "fltrust"
    if name not in TRAINING:
        torch.testing.assert_close(result.delta, delta[0])


@pytest.mark.parametrize("name", NAMES)
def test_identical_updates_are_their_own_aggregate(name: str) -> None:
    """But FoolsGold takes them for sybils, all of them, keeps nobody and changes nothing."""
    delta = draws(1)
    result = run(name, delta.repeat(6, 1))
    sound(result, 6)
    if name == "foolsgold":
        assert not result.kept.any() if result.kept is not None else False
        assert not result.delta.any()
    elif name not in TRAINING:
        torch.testing.assert_close(result.delta, delta[0])


@pytest.mark.parametrize("name", NAMES)
def test_rules_run_where_every_client_is_supposed_malicious(name: str) -> None:
    """No guarantee holds any more, but the step is finite and, where a mean, in the range of the updates and zero."""
    deltas = draws(5)
    result = run(name, deltas, attackers=5)
    sound(result, 5)
    if name not in TRAINING | {"rlr"}:
        assert (result.delta <= deltas.amax(0).clamp(min=0) + 1e-6).all()
        assert (result.delta >= deltas.amin(0).clamp(max=0) - 1e-6).all()


@pytest.mark.parametrize("name", NAMES)
def test_zero_updates_change_nothing(name: str) -> None:
    result = run(name, torch.zeros(5, PARAMETERS))
    sound(result, 5)
    if name != "indicator":
        assert result.delta.abs().max() < 1e-6


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("bulyan", "bucketing", "indicator")])
def test_the_order_of_clients_does_not_matter(name: str) -> None:
    """The kept follow their clients.

    Not tried: Bulyan, whose last picks tie between mutual nearest neighbours; bucketing, which draws over positions;
    the indicator, whose training magnifies rounding.
    """
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    deltas, weights = draws(), torch.arange(1.0, 8) / 28
    first, second = run(name, deltas, weights), run(name, deltas[order], weights[order])
    torch.testing.assert_close(first.delta, second.delta, atol=1e-6, rtol=1e-4)
    if first.kept is not None:
        assert second.kept is not None
        assert torch.equal(first.kept[order], second.kept)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_honoured_or_ignored(name: str) -> None:
    """As each docstring says; those that ignore them give the very same step."""
    deltas, skewed = draws(), torch.tensor([0.4, 0.3, 0.1, 0.05, 0.05, 0.05, 0.05])
    same = torch.allclose(run(name, deltas).delta, run(name, deltas, skewed).delta, atol=1e-7)
    if name != "krum":  # one update, whatever its weight
        assert same == (name not in WEIGHTED) or name in ("bucketing", "flower")


@pytest.mark.parametrize("name", NAMES)
def test_inputs_stay_as_they_are_to_the_bit(name: str) -> None:
    """And the result shares no memory with them, so writing to it does not reach them."""
    deltas, weights, ctx = draws(), even(7), context(7)
    vector = ctx.vector.clone()
    result = rule_of(name).aggregate(deltas, weights, {}, ctx)
    result.delta.fill_(9.0)
    assert torch.equal(deltas, draws())
    assert torch.equal(weights, even(7))
    assert torch.equal(ctx.vector, vector)


@pytest.mark.parametrize("name", NAMES)
def test_rules_take_a_view_of_wider_rows(name: str) -> None:
    """The round loop hands over the parameters' columns of longer vectors."""
    wide = torch.cat([draws(), torch.full((7, 9), 1e3)], 1)
    torch.testing.assert_close(run(name, wide[:, :PARAMETERS]).delta, run(name, draws()).delta, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FRAGILE])
def test_a_broken_update_counts_as_none(name: str, bad: float) -> None:
    """The others' result is what it would be without that client, of whom one fewer is supposed malicious."""
    deltas = draws()
    rest = torch.tensor([0, 1, 2, 4, 5, 6])
    deltas[3, 17] = bad
    result = run(name, deltas)
    ctx = replace(context(6, attackers=0), clients=(0, 1, 2, 4, 5, 6))
    expected = rule_of(name).aggregate(deltas[rest], even(6), {}, ctx)
    torch.testing.assert_close(result.delta, expected.delta)
    assert result.kept is not None
    assert not result.kept[3]
    assert torch.equal(result.kept[rest], torch.ones(6, dtype=torch.bool) if expected.kept is None else expected.kept)


def test_deepsight_rejects_whose_model_answers_noise_with_nan() -> None:
    """1e10 in every weight: the update can be reckoned with, the logits of its model can't."""
    deltas = draws()
    deltas[3] = 1e10
    result = run("deepsight", deltas)
    sound(result, 7)
    assert result.kept is not None
    assert not result.kept[3]
    assert bool(result.kept.any())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FRAGILE])
def test_nothing_but_broken_updates_changes_nothing(name: str) -> None:
    result = run(name, torch.full((3, PARAMETERS), float("nan")))
    sound(result, 3)
    assert not result.delta.any()
    assert result.kept is not None
    assert not result.kept.any()


def saved(state: State) -> State:
    """The state after a checkpoint, which unpickles nothing but tensors and plain values."""
    file = io.BytesIO()
    torch.save(dict(state), file)
    file.seek(0)
    loaded: State = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("name", NAMES)
def test_memory_survives_a_checkpoint(name: str) -> None:
    """Three rounds with the state saved and loaded in between are three rounds without."""
    rule, straight, stored = rule_of(name), dict[str, Any](), dict[str, Any]()
    for round_ in (1, 2, 3):
        deltas = draws(seed=round_)
        first = rule.aggregate(deltas, even(7), straight, context(7, round_=round_))
        second = rule.aggregate(deltas, even(7), saved(stored), context(7, round_=round_))
        assert torch.equal(first.delta, second.delta)
        straight, stored = dict(first.state), dict(second.state)
        assert all(isinstance(value, (Tensor, float, int, str, bool)) for value in straight.values())
