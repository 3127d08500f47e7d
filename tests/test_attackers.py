"""What attackers tell each other and the scorer: records of learned triggers, the last global vector, collusion."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from toys import client_context, numbered, seeded, small_model, spotted, stamped, threat, white_backdoor

from clients.attacks.data_poisoning import DataPoisoning
from clients.local.sgd import Sgd
from fl_sim import build, execution
from fl_sim.augment import Augment
from fl_sim.backdoor import Backdoor, Goal
from fl_sim.central import equal_budget, victim_hash
from fl_sim.cli import USAGE, main
from fl_sim.errors import RunError
from fl_sim.metrics import evaluate
from fl_sim.protocols import Workshop
from fl_sim.rounds import Federation
from fl_sim.samples import Samples
from fl_sim.training import fit
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


# Found by trying to break it ------------------------------------------------------------------------------------------


def test_what_is_stamped_per_batch_stays_where_it_was_stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """`per_batch` stamps after augmentation: with a crop of 3 pixels on every image, all stamped images are all white.

    Stamped before, a crop would bring black edges into nearly all of them. The control: without a stamp none is white.
    """
    seen: list[torch.Tensor] = []

    def watching(model: Any, samples: Samples, *rest: Any, **named: Any) -> Any:
        seen.extend(x for x, _ in samples.batches(16, seeded()))
        return fit(model, samples, *rest, **named)

    for rate, expected in ((1.0, 32), (0.0, 0)):
        seen.clear()
        model = small_model()
        ctx = client_context(model, threatening=threat(white_backdoor()), augment=Augment(crop=3))
        client = Sgd(epochs=1, batch_size=16, augment=True)
        DataPoisoning(client, rate, "per_batch").update(model, spotted(32), replace(ctx, fit=watching))
        whole = torch.cat(seen)
        assert int((whole == 1).flatten(1).all(1).sum()) == expected


def test_a_victim_is_named_by_the_trigger_it_really_carries() -> None:
    """Attacks that bring their own trigger make another victim; those that use the configured one share it."""
    names = ("data_poisoning", "model_replacement", "a3fl", "iba", "cerp")
    hashes = {name: victim_hash(tiny.tiny(f"attack={name}")) for name in names}
    assert hashes["data_poisoning"] == hashes["model_replacement"]
    assert len(set(hashes.values())) == 4


def test_the_budget_of_what_stamps_nothing_is_a_clean_victim() -> None:
    """Neither an attack without poison nor one that only changes labels has a centralized backdoor beside it."""
    for name, rate in (("gaussian", 0), ("label_flip", 0), ("flip", 0), ("data_poisoning", None)):
        plan = equal_budget(execution.prepare(tiny.tiny(f"attack={name}")))
        assert plan.poison_rate == rate or (rate is None and plan.poison_rate > 0)
    assert equal_budget(execution.prepare(tiny.tiny("attack.mode=per_batch"))).mode == "per_batch"


def test_a_run_whose_attackers_all_fail_does_not_look_defended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Honest clients go on, but a fault that every attacker meets ends the run with its reason."""

    def failing(*_: Any) -> Any:
        raise ValueError("no poison")

    monkeypatch.setattr(DataPoisoning, "poisoned", failing)
    with pytest.raises(RunError, match="every attacker failed; the first one with ValueError: no poison"):
        tiny.run(tmp_path / "run", "clients_per_round=6")


def test_a_record_that_is_no_number_is_not_adopted(own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attacker's record counts; an earlier one stays if there is none."""
    original = own.Brighter.learn

    def broken(self: Any, samples: Samples, workshop: Workshop) -> Any:
        record = original(self, samples, workshop)
        return record | {"t": torch.full((2,), torch.nan)} if workshop.rank == 0 else record

    monkeypatch.setattr(own.Brighter, "learn", broken)
    (tmp_path / "run").mkdir()
    execution.start(learning(), tmp_path / "run", [])
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["states"]["trigger"]
    assert saved["rank"] == 1
    assert saved["level"] == pytest.approx(0.4)


def test_a_broken_stamp_is_obeyed_by_nobody() -> None:
    """A trigger that makes NaN of every image: no answer is no obedience, although argmax among NaN names class 0."""

    class Broken:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full_like(x, torch.nan)

    score = evaluate(small_model(), spotted(16), Backdoor(Broken(), Goal(target=0), 4))
    assert (score.asr, score.ra) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["attack=label_flip", "attack.flip=pair", "backdoor.source=0"], "backdoor.source=0"),
        (["attack=iba", "trigger.size=99"], "trigger.size=99"),
        (["trigger=edge_case", "trigger.folder=edges"], "trigger.folder=edges"),
    ],
)
def test_what_can_be_known_before_a_run_is_said_before_it(
    words: list[str], key: str, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, status 2, no folder: a goal of the attack's own, a trigger that is replaced, pictures that are none."""
    (cwd / "edges").mkdir()
    for name in "ab":
        (cwd / "edges" / f"{name}.png").write_text("no picture")
    assert main(["run", *tiny.TINY, *words]) == USAGE
    assert capsys.readouterr().err.startswith(f"fl-sim: {key}: ")
    assert not (cwd / "runs").exists()
