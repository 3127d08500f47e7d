"""When the server erases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional as F
from toys import small_model, spotted, weights_of

from clients.attacks.data_poisoning import DataPoisoning
from fl_sim import execution
from fl_sim.errors import ConfigError
from fl_sim.metrics import accuracy
from fl_sim.protocols import Decision, ServerPlan, Signals
from fl_sim.rounds import Federation
from fl_sim.signals import clean_score, noted, noted_erasing
from fl_sim.summary import Curves, rounds_until_back
from server.erasing import AtEnd, Budget, Every, Never, OnSuspicion, Policy


@pytest.mark.parametrize(
    ("policy", "due"),
    [
        (Never(), []),
        (AtEnd(), [10]),
        (Every(rounds=3), [3, 6, 9]),
        (Every(rounds=5), [5, 10]),
        (Every(rounds=1), list(range(1, 11))),
        (Every(rounds=11), []),
    ],
)
def test_rounds_of_ten_in_which_an_erasing_is_due(policy: Every, due: list[int]) -> None:
    assert [t for t in range(1, 11) if policy.due(t, 10)] == due


@pytest.mark.parametrize("make", [Never, AtEnd, Every])
def test_floors_are_fractions(make: type[Policy]) -> None:
    assert make(floor=1.0).floor == 1.0
    for floor in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="floor"):
            make(floor=floor)


def test_every_needs_a_period() -> None:
    with pytest.raises(ConfigError, match="rounds=0"):
        Every(rounds=0)


# Policies that watch --------------------------------------------------------------------------------------------------

CALM = Signals(rejected=(0.0,) * 6, steps=(1.0,) * 6, accuracies=(0.8,) * 6, losses=(0.5,) * 6, rounds_since_erasing=6)
"""Six rounds in which nothing happens."""


def latest(**values: float) -> Signals:
    """Six calm rounds whose last one differs."""
    return replace(CALM, **{name: (*getattr(CALM, name)[:-1], value) for name, value in values.items()})


@pytest.mark.parametrize(
    ("signals", "named"),
    [
        (CALM, None),
        (latest(steps=2.0), None),  # twice the usual is not yet more than twice
        (latest(steps=2.1), "step 2.1, usually 1"),
        (latest(steps=0.01), None),
        (latest(rejected=0.25), None),
        (latest(rejected=0.4), "rejected share 0.4, usually 0"),
        (latest(accuracies=0.71), None),
        (latest(accuracies=0.69), "clean accuracy 0.69, usually 0.8"),
        (latest(accuracies=0.99), None),
        (latest(losses=0.74), None),
        (latest(losses=0.76), "clean loss 0.76, usually 0.5"),
        (latest(steps=3.0, losses=1.0), "step 3, usually 1; clean loss 1, usually 0.5"),
        (latest(losses=float("nan")), "clean loss nan, usually 0.5"),
        (replace(CALM, losses=(float("nan"), 0.5, float("inf"), 0.5, 0.5, 0.5)), None),  # long mended
        (latest(steps=float("inf")), "step inf, usually 1"),
        (replace(CALM, rejected=(0.75,) * 6), None),  # Krum keeps one of four in every round: nothing unusual
    ],
)
def test_suspicion_by_hand(signals: Signals, named: str | None) -> None:
    """Thresholds 0.3, 2, 0.1 and 1.5 against the medians of five calm rounds: 0, 1, 0.8 and 0.5."""
    assert OnSuspicion().decide(signals) == Decision(named is not None, named or "nothing unusual")


def test_a_signal_that_is_left_out_or_not_there_raises_no_suspicion() -> None:
    unusual = latest(rejected=1.0, steps=9.0, accuracies=0.1, losses=9.0)
    blind = OnSuspicion(rejected=None, step=None, accuracy=None, loss=None)
    assert not blind.decide(unusual).erase
    assert not OnSuspicion(rejected=None, step=None).decide(replace(unusual, accuracies=(), losses=())).erase
    assert OnSuspicion(rejected=None, step=None).decide(unusual).erase
    assert [policy.watches_clean_set for policy in (OnSuspicion(), OnSuspicion(loss=None), blind)] == [
        True,
        True,
        False,
    ]


def test_nothing_is_suspected_before_there_is_a_past_nor_right_after_an_erasing() -> None:
    """With patience 3 the fourth round is the first that is judged, by all of the past, and so after an erasing."""
    policy, steps = OnSuspicion(loss=None, accuracy=None), (1.0, 9.0, 81.0, 729.0)
    judged = [policy.decide(Signals((0.0,) * n, steps[:n], rounds_since_erasing=n)) for n in range(1, 5)]
    assert [decision.erase for decision in judged] == [False, False, False, True]
    assert judged[0].reason == "watching for 3 more"
    signals = noted_erasing(CALM, 2.5)
    assert signals == replace(CALM, rounds_since_erasing=0, erasing_seconds=(2.5,))
    decisions = []
    for _ in range(4):
        signals = noted(signals, torch.tensor([5.0]), None, None)
        decisions.append(policy.decide(signals).erase)
    assert decisions == [False, False, False, True]  # the median of six ones and three fives is one


def test_the_window_forgets() -> None:
    """Long ago steps were 10; the median of all nine before is 10, of the last two it is 1: 3 is unusual only then."""
    signals = Signals((0.0,) * 10, (10.0,) * 7 + (1.0, 1.0, 3.0), rounds_since_erasing=10)
    assert OnSuspicion(window=2).decide(signals).erase
    assert not OnSuspicion(window=9).decide(signals).erase


@pytest.mark.parametrize(
    ("elapsed", "past", "seconds", "erase"),
    [
        (0.0, (), None, True),  # a first erasing of unknown cost
        (9.0, (1.0,), None, False),  # 1 + 1 of 9 + 1 seconds is a fifth, a tenth is allowed
        (18.9, (1.0,), None, False),
        (19.1, (1.0,), None, True),  # 2 of 20.1
        (100.0, (2.0, 4.0), None, True),  # 6 + 3 of 103
        (80.0, (2.0, 4.0), None, False),  # 9 of 83
        (100.0, (2.0, 4.0), 8.9, False),  # within the share, but 9 seconds are too many
        (100.0, (2.0, 4.0), 9.0, True),
    ],
)
def test_the_budget_by_hand(elapsed: float, past: tuple[float, ...], seconds: float | None, erase: bool) -> None:
    """Spent plus the mean cost, at most a tenth of the time that the run will have taken, and at most `seconds`."""
    signals = replace(CALM, elapsed_seconds=elapsed, erasing_seconds=past)
    assert Budget(seconds=seconds).decide(signals).erase is erase
    assert not Budget(seconds=seconds, patience=7).decide(signals).erase  # there have been six rounds


@pytest.mark.parametrize(
    ("make", "knobs"),
    [
        (OnSuspicion, {"patience": 0}),
        (OnSuspicion, {"window": 0}),
        (OnSuspicion, {"rejected": 0.0}),
        (OnSuspicion, {"step": 1.0}),
        (OnSuspicion, {"accuracy": -0.1}),
        (OnSuspicion, {"loss": 0.9}),
        (Budget, {"share": 0.0}),
        (Budget, {"share": 1.1}),
        (Budget, {"seconds": 0.0}),
        (Budget, {"floor": 2.0}),
    ],
)
def test_policies_that_watch_refuse_the_impossible(make: Any, knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**knobs)
    assert [caught.value.key] == list(knobs)


def test_signals_of_a_round() -> None:
    """A step of (3, 4) is 5 long; one of four rows was not kept."""
    once = noted(Signals(), torch.tensor([3.0, 4.0]), torch.tensor([True, True, False, True]), (0.5, 1.25))
    assert once == Signals((0.25,), (5.0,), (0.5,), (1.25,), 1)
    twice = noted(once, torch.zeros(2), None, None)
    assert twice == Signals((0.25, 0.0), (5.0, 0.0), (0.5,), (1.25,), 2)


def test_the_clean_score_is_the_plain_one_and_changes_nothing() -> None:
    model, clean = small_model().train(), spotted(21)
    before = weights_of(model)
    right, loss = clean_score(model, clean, chunk=8)
    assert model.training
    assert torch.equal(weights_of(model), before)
    model.eval()
    assert right == pytest.approx(accuracy(model, clean))
    assert loss == pytest.approx(float(F.cross_entropy(model(clean.images), clean.labels).detach()), rel=1e-5)


def test_what_attackers_know_of_a_policy_that_cannot_be_foretold() -> None:
    """Of this round what they noticed, of any other that it may follow an erasing; plans stay foreseeable."""
    eraser: Any = object()
    watched = ServerPlan(eraser, OnSuspicion(), 10, {4: False, 7: True})
    assert [watched.erased_before(t) for t in (1, 4, 5, 7)] == [False, False, True, True]
    assert not any(ServerPlan(None, OnSuspicion(), 10).erased_before(t) for t in range(1, 11))
    planned = ServerPlan(eraser, Every(rounds=3), 10, {5: True})
    assert [t for t in range(1, 11) if planned.erased_before(t)] == [4, 7, 10]


# Runs -----------------------------------------------------------------------------------------------------------------

ALARMED = (
    *("eraser=fine_tune", "eraser.epochs=1", "eraser.min_steps=4", "erasing=on_suspicion"),
    *("rounds=7", "sampler=fixed_malicious", "threat=single_shot", "threat.at=5", "attack.boost=20"),
)
"""A step twenty-fold in round 5, after four calm ones."""


def test_a_boosted_update_raises_suspicion_and_a_resumed_run_decides_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Erased after round 5 and no other; interrupted after round 4, the medians come back with the checkpoint."""
    folder = tiny.run(tmp_path / "whole", *ALARMED, "erasing.accuracy=null", "erasing.loss=null")
    assert [(e["round"], e["cause"].split()[0]) for e in tiny.events(folder, "erase")] == [(5, "step")]
    rounds = tiny.events(folder, "round")
    assert rounds[4]["step"] > 2 * max(event["step"] for event in rounds[:4])
    assert [event["erasing_decision"] for event in rounds[5:]] == ["watching for 3 more", "watching for 2 more"]
    assert "clean_acc" not in rounds[0]

    whole = tiny.run(tmp_path / "watching everything", *ALARMED)
    assert {"clean_acc", "clean_loss", "rejected", "step"} <= tiny.events(whole, "round")[0].keys()
    original = Federation._save

    def broken(self: Federation, t: int) -> None:
        original(self, t)
        if t == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Federation, "_save", broken)
        with pytest.raises(KeyboardInterrupt):
            tiny.run(tmp_path / "broken", *ALARMED)
    execution.resume(tmp_path / "broken")
    assert tiny.numbers(tmp_path / "broken") == tiny.numbers(whole)
    assert tiny.events(whole, "erase")


def test_a_budget_is_kept_and_attackers_notice_the_erasings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of the time is enough for an erasing each round; next to none only for the first, of unknown cost."""
    seen: dict[int, bool] = {}
    original = DataPoisoning.update

    def spying(self: DataPoisoning, model: Any, samples: Any, ctx: Any) -> Any:
        seen[ctx.round] = ctx.threatening.plan.erased_before(ctx.round)
        return original(self, model, samples, ctx)

    monkeypatch.setattr(DataPoisoning, "update", spying)
    words = (*tiny.ERASING[:3], "erasing=budget", "erasing.patience=1", "erasing.floor=0", "sampler=fixed_malicious")
    rich = tiny.run(tmp_path / "rich", *words, "attack=data_poisoning", "erasing.share=1")
    assert [event["round"] for event in tiny.events(rich, "erase")] == [1, 2, 3]
    assert seen == {1: False, 2: True, 3: True}
    poor = tiny.run(tmp_path / "poor", *words, "attack=data_poisoning", "erasing.share=1e-9")
    assert [event["round"] for event in tiny.events(poor, "erase")] == [1]
    assert [event["erasing_decision"] for event in tiny.events(poor, "round")] == [
        "within the budget",
        "beyond the budget",
        "beyond the budget",
    ]
    assert seen == {1: False, 2: True, 3: False}
    kept = torch.load(poor / "checkpoint.pt")["signals"]
    assert kept["erasing_seconds"] == (tiny.events(poor, "erase")[0]["seconds"],)
    assert kept["elapsed_seconds"] == pytest.approx(sum(event["seconds"] for event in tiny.events(poor, "round")))


# How long an erasing lasts --------------------------------------------------------------------------------------------


def erasing(t: int, before: float | None, after: float | None, accepted: bool = True) -> dict[str, Any]:
    return {"event": "erase", "round": t, "asr_before": before, "asr": after, "accepted": accepted, "eraser": "x"}


def measured(**by_round: float | None) -> list[dict[str, Any]]:
    return [{"event": "round", "round": int(name[1:]), "acc": 0.9, "asr": asr} for name, asr in by_round.items()]


@pytest.mark.parametrize(
    ("events", "rounds"),
    [
        ([erasing(2, 0.8, 0.1), *measured(r2=0.1, r3=0.3, r4=0.41, r5=0.9)], [2]),
        ([erasing(2, 0.8, 0.1), *measured(r1=0.9, r2=0.1, r3=0.3, r4=0.4)], [None]),  # half is not above half
        ([erasing(2, 0.8, 0.5), *measured(r2=0.5, r3=0.1)], [0]),  # never below
        ([erasing(2, 0.8, 0.7, accepted=False), *measured(r2=0.8, r3=0.9)], [None]),
        ([erasing(2, None, None), *measured(r2=None, r3=None)], [None]),
        # What the next erasing found counts for the first, what it left does not, and nothing after it.
        ([erasing(2, 0.8, 0.1), erasing(4, 0.5, 0.1), *measured(r2=0.1, r3=0.2, r4=0.1, r5=0.9)], [2, 1]),
        ([erasing(2, 0.8, 0.1), erasing(4, 0.3, 0.1), *measured(r2=0.1, r3=0.2, r4=0.1, r5=0.9)], [None, 1]),
        # A refused erasing ends nothing; rounds that were not measured are passed over.
        ([erasing(2, 0.8, 0.1), erasing(4, 0.3, 0.0, accepted=False), *measured(r2=0.1, r6=0.9)], [4, None]),
    ],
)
def test_rounds_until_an_erased_backdoor_is_back(events: list[dict[str, Any]], rounds: list[int | None]) -> None:
    """Above half of the ASR before: above 0.4 for 0.8."""
    curves = Curves.of(events)
    assert [rounds_until_back(event, curves) for event in curves.erasings] == rounds
