"""What attackers tell each other and the scorer: records of learned triggers, the last global vector, collusion."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from toys import numbered, seeded, small_model, stamped, white_backdoor

from fl_sim import build, execution
from fl_sim.backdoor import Backdoor, Goal
from fl_sim.protocols import Workshop
from fl_sim.rounds import Federation
from fl_sim.samples import Samples
from server.optimizers import Plain

OWN = '''
from dataclasses import dataclass, replace
import torch
from clients.attacks.data_poisoning import DataPoisoning

TOLD = []


@dataclass(frozen=True)
class Brighter:
    """Learns one number: each lesson adds 0.1 to the brightness of the whole stamped image."""

    level: float = 0.0

    def __call__(self, x):
        return torch.full_like(x, self.level)

    def learn(self, samples, workshop):
        return {"level": float(workshop.record.get("level", 0.0)) + 0.1, "rank": workshop.rank, "t": torch.ones(2)}

    def recall(self, record):
        return Brighter(float(record["level"]))


@dataclass(frozen=True)
class Telling(DataPoisoning):
    """Notes what it was told."""

    def update(self, model, samples, ctx):
        TOLD.append(ctx)
        return super().update(model, samples, ctx)


@dataclass(frozen=True)
class Opposite:
    """Every attacker sends minus the honest mean."""

    def tamper(self, deltas, malicious, ctx):
        out = deltas.clone()
        out[malicious] = -deltas[~malicious].mean(0)
        return out
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An importable module with a user's own trigger, attack and collusion."""
    (tmp_path / "own_attackers.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    build.world_of.cache_clear()  # which may hold objects of an earlier test's module
    yield importlib.import_module("own_attackers")
    sys.modules.pop("own_attackers", None)


def learning() -> dict[str, Any]:
    """Six clients, all of them in each of four rounds, three attackers with the learned trigger above."""
    config = tiny.tiny("attack=data_poisoning", "clients_per_round=6", "rounds=4", "engine.workers=1")
    config["attack"]["_target_"] = "own_attackers.Telling"
    config["trigger"] = {"_target_": "own_attackers.Brighter"}
    return config


def test_a_learned_trigger_reaches_the_other_attackers_and_the_scorer(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three attackers a round each add 0.1 to what the round's first one of the last round had come to.

    So in round t they are told 0.1·(t − 1), by the record of rank 0, and the scorer stamps 0.1·t.
    """
    scored: list[float] = []
    original = Backdoor.stamp

    def spying(self: Backdoor, pixels: torch.Tensor) -> torch.Tensor:
        result = original(self, pixels)
        scored.append(round(float(result.max()), 6))
        return result

    monkeypatch.setattr(Federation, "_score", _quietly(spying, Federation._score))
    (tmp_path / "run").mkdir()
    execution.start(learning(), tmp_path / "run", [])
    levels = [(ctx.round, float(ctx.threatening.record.get("level", 0.0))) for ctx in own.TOLD]
    assert levels == [(t, pytest.approx(0.1 * (t - 1))) for t in range(1, 5) for _ in range(3)]
    assert {ctx.threatening.record.get("rank", 0) for ctx in own.TOLD} == {0}
    assert scored == [pytest.approx(0.1 * t) for t in range(1, 5)]
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["states"]["trigger"]
    assert saved["level"] == pytest.approx(0.4)
    assert torch.equal(saved["t"], torch.ones(2))


def _quietly(stamp: Callable[..., torch.Tensor], score: Callable[..., Any]) -> Callable[..., Any]:
    """The scorer with its stamping spied upon; the attackers' own stamping is not."""

    def scoring(self: Federation, vector: torch.Tensor) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Backdoor, "stamp", stamp)
            return score(self, vector)

    return scoring


def test_attackers_see_the_global_vector_of_their_last_round(own: Any, tmp_path: Path) -> None:
    """None in the first round; then what the attackers of the round before received. Honest clients see nothing."""
    (tmp_path / "run").mkdir()
    execution.start(learning(), tmp_path / "run", [])
    received = {ctx.round: ctx.received for ctx in own.TOLD}
    assert [ctx.threatening.previous is None for ctx in own.TOLD] == [True] * 3 + [False] * 9
    for ctx in own.TOLD[3:]:
        assert torch.equal(ctx.threatening.previous, received[ctx.round - 1])
    assert all(ctx.threatening.plan.eraser is None for ctx in own.TOLD)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_what_a_trigger_has_learned_survives_an_interruption(own: Any, tmp_path: Path, at: int) -> None:
    """The record and the attackers' last vector are in the checkpoint: same numbers, same lessons as undisturbed."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    execution.start(learning(), tmp_path / "whole", [])
    lessons = [(ctx.round, ctx.client, ctx.threatening.record.get("level")) for ctx in own.TOLD]
    previous = [ctx.threatening.previous for ctx in own.TOLD]
    own.TOLD.clear()
    save = Federation._save

    def ending(self: Federation, t: int) -> None:
        save(self, t)
        if t == at:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "_save", ending)
        with pytest.raises(KeyboardInterrupt):
            execution.start(learning(), tmp_path / "cut", [])
    execution.resume(tmp_path / "cut")
    assert tiny.numbers(tmp_path / "cut") == tiny.numbers(tmp_path / "whole")
    assert [(ctx.round, ctx.client, ctx.threatening.record.get("level")) for ctx in own.TOLD] == lessons
    for ctx, before in zip(own.TOLD, previous, strict=True):
        assert (ctx.threatening.previous is None) == (before is None)
        assert before is None or torch.equal(ctx.threatening.previous, before)


@pytest.mark.usefixtures("own")
def test_collusion_replaces_the_attackers_updates_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of six send minus the mean of the three honest updates, so the average is zero: no parameter moves.

    With attack=none the colluders train as honest clients and count as malicious all the same.
    """
    config = tiny.tiny("attack=none", "collusion=none", "clients_per_round=6", "rounds=1")
    config["collusion"] = {"_target_": "own_attackers.Opposite"}
    (tmp_path / "run").mkdir()
    steps: list[torch.Tensor] = []
    original = Plain.step

    def spying(self: Plain, delta: torch.Tensor, state: Any) -> Any:
        steps.append(delta)
        return original(self, delta, state)

    monkeypatch.setattr(Plain, "step", spying)
    execution.start(config, tmp_path / "run", [])
    [step] = steps
    assert float(step.abs().max()) < 1e-6
    [event] = tiny.events(tmp_path / "run", "round")
    assert event["malicious"] == 3


class Halves:
    """Trains on half-white images, hides with black ones; the scorer stamps all white."""

    cover = 0.5

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)

    def craft(self, x: torch.Tensor, y: torch.Tensor, workshop: Workshop) -> torch.Tensor:
        return torch.full_like(x, 0.5)

    def disguise(self, x: torch.Tensor, y: torch.Tensor, workshop: Workshop) -> torch.Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("mode", ["dataset", "per_batch"])
def test_crafted_images_and_cover_samples_are_counted_exactly(mode: Any) -> None:
    """Of 20 samples at rate 0.4: 8 crafted and relabelled, 4 disguised with their own labels, 8 as is."""
    samples = Samples(numbered([1] * 20).images + 0.1, torch.ones(20, dtype=torch.long))  # none is black by nature
    shop = Workshop(small_model(), Goal(), 4, seeded(), 0, 1)
    backdoor = Backdoor(Halves(), Goal(), 4)
    poisoned = backdoor.poison(samples, 0.4, mode, seeded(), shop)
    x, y = next(iter(poisoned.batches(20, seeded(1))))
    level = x.flatten(1).mean(1)
    assert int((level == 0.5).sum()) == 8
    assert torch.equal(y == 0, level == 0.5)
    assert int((level == 0).sum()) == 4
    assert bool(stamped(backdoor.test_set(samples)).all())


def test_cover_takes_at_most_half_of_what_is_left() -> None:
    """At rate 0.8 of 20, 16 are poisoned; 8 covers were wanted, 2 of the 4 that are left are taken."""
    assert Backdoor(Halves(), Goal(), 4)._counts(20, 0.8) == (16, 2)
    assert Backdoor(Halves(), Goal(), 4)._counts(20, 1.0) == (20, 0)
    assert white_backdoor()._counts(20, 0.8) == (16, 0)


class Bright:
    """A natural trigger: images whose first pixel is above one half."""

    rule = "source_specific"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def selects(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, 0, 0] > 0.5


def test_a_natural_trigger_poisons_and_scores_only_the_images_that_carry_it() -> None:
    """Six images of the source class, three of them bright: rate 1 relabels those three; the same three are victims."""
    images = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.9, 0.9]).view(8, 1, 1, 1).expand(8, 1, 2, 2).clone()
    labels = torch.tensor([1, 1, 1, 1, 1, 1, 2, 0])
    goal = Goal("auto", target=0, source=1).resolved(Bright())
    assert goal.rule == "source_specific"
    backdoor = Backdoor(Bright(), goal, 4)
    poisoned = backdoor.poison(Samples(images, labels), 1.0, "dataset", seeded())
    assert poisoned.labels.tolist() == [0, 1, 0, 1, 0, 1, 2, 0]
    assert torch.equal(poisoned.images, images)
    assert backdoor.victims(images, labels).tolist() == [True, False, True, False, True, False, False, False]


@pytest.mark.parametrize(("rule", "preferred", "expected"), [
    ("auto", None, "all_to_one"), ("auto", "clean_label", "clean_label"), ("all_to_all", "clean_label", "all_to_all"),
])  # fmt: skip
def test_the_rule_auto_is_the_triggers_own(rule: Any, preferred: str | None, expected: str) -> None:
    """`auto` follows the trigger's paper; a rule that was asked for is never changed."""

    class Some:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x

    trigger = Some()
    if preferred:
        trigger.rule = preferred  # type: ignore[attr-defined]
    assert Goal(rule).resolved(trigger).rule == expected
