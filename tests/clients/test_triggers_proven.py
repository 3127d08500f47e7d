"""That the triggers without training really get into a model, centrally, in an attacker's client and federated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from toys import seeded

from clients.triggers.cl import Cl
from clients.triggers.sig import Sig
from fl_sim import execution
from fl_sim.backdoor import Backdoor, Goal
from fl_sim.build import component
from fl_sim.composing import compose_config
from fl_sim.data.digits import Digits
from fl_sim.metrics import Score, evaluate
from fl_sim.models.classifier import Classifier, build_classifier
from fl_sim.models.cnn import Cnn
from fl_sim.protocols import Learned, Trigger, Workshop
from fl_sim.samples import Samples
from fl_sim.training import fit, sgd


@lru_cache(maxsize=1)
def digits() -> tuple[Samples, Samples]:
    loaded = Digits().load()
    return loaded.train, loaded.test


def trained(samples: Samples, epochs: int) -> Classifier:
    facts = Digits().facts
    model = build_classifier(Cnn(width=8), facts.shape, 10, facts.mean, facts.std, seeded(2))
    fit(model, samples, sgd(model, 0.1, momentum=0.9), epochs=epochs, batch_size=64, rng=seeded(4))
    return model.eval()


@lru_cache(maxsize=1)
def clean_model() -> Classifier:
    return trained(digits()[0], 8).requires_grad_(False)


def scores(trigger: Trigger, rate: float, epochs: int, target: int) -> tuple[Score, Score]:
    """Of a model trained on poisoned digits, and of one trained on clean digits."""
    train, test = digits()
    goal = Goal("auto", target, source=1).resolved(trigger)
    shop = Workshop(clean_model(), goal, 10, seeded(5), rank=0, attackers=1)
    if isinstance(trigger, Learned):
        trigger = trigger.recall(trigger.learn(train, shop))
    backdoor = Backdoor(trigger, goal, 10)
    victim = trained(backdoor.poison(train, rate, "dataset", seeded(3), shop), epochs)
    return evaluate(victim, test, backdoor), evaluate(clean_model(), test, backdoor)


@dataclass(frozen=True)
class Proof:
    """How a trigger is proven: by default a tenth of the samples, or half of those that the rule admits."""

    trigger: Any
    rate: float = 0.1
    epochs: int = 8
    target: int = 0


def by_name(name: str, *overrides: str) -> Trigger:
    made: Trigger = component("trigger", compose_config([f"trigger={name}", *overrides])["trigger"])
    return made


PROOFS = {
    "refool": Proof(lambda: by_name("refool")),
    "a_blend": Proof(lambda: by_name("a_blend")),
    "svd": Proof(lambda: by_name("svd")),
    "wave": Proof(lambda: by_name("wave"), epochs=18),
    "dba": Proof(lambda: by_name("dba")),
    "cba": Proof(lambda: by_name("cba"), rate=0.2, epochs=12),
    "edge_case": Proof(lambda: by_name("edge_case"), rate=0.5),
    # All of the images that carry it: otherwise the attacker's own labels contradict each other.
    "semantic": Proof(lambda: by_name("semantic"), rate=1.0),
    # On easy digits there is hardly anything left to learn from a clean-label stamp: a hard class, most of its
    # images, and stronger changes than the papers' on photographs.
    "sig": Proof(lambda: Sig(delta=0.5), rate=0.95, epochs=6, target=8),
    "cl": Proof(lambda: Cl(epsilon=0.3, steps=20), rate=0.8, epochs=6, target=8),
    # With all their cover, what tells a warp from a shaken one, or a patch from cover, takes longer to learn.
    "wanet": Proof(lambda: by_name("wanet", "trigger.strength=1", "trigger.cover=0.25"), rate=0.15, epochs=15),
    "a_patch": Proof(lambda: by_name("a_patch", "trigger.cover=0.25"), rate=0.2, epochs=10),
}


LONG = ("refool", "wave", "cba", "wanet")


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.slow] if each in LONG else []) for each in PROOFS]
)
def test_a_model_learns_the_backdoor_and_a_clean_one_does_not_have_it(name: str) -> None:
    """ASR ≥ 0.9 at an ACC within 0.05 of the clean model's; the clean model's ASR near chance."""
    proof = PROOFS[name]
    victim, clean = scores(proof.trigger(), proof.rate, proof.epochs, proof.target)
    assert victim.asr is not None
    assert clean.asr is not None
    assert victim.asr >= 0.9
    assert victim.acc >= clean.acc - 0.05
    assert clean.asr <= 0.3


@pytest.mark.parametrize("name", ["cl", "refool", "dba", "cba", "semantic"])
def test_a_run_carries_what_the_trigger_needs(name: str, tmp_path: Path) -> None:
    """Through configuration, client, record and scorer: three rounds; learned ones leave their record behind."""
    folder = tiny.run(tmp_path / "run", f"trigger={name}", "engine.workers=1")
    assert len(tiny.events(folder, "round")) == 3
    record = torch.load(folder / "checkpoint.pt", weights_only=True)["states"]["trigger"]
    assert set(record) == {"refool": {"layers"}, "cba": {"images", "partner"}, "semantic": {"threshold"}}.get(
        name, set()
    )


STRONGER = {
    "cl": ["trigger.epsilon=0.3", "backdoor.target=8", "attack.poison_rate=0.8", "attack.epochs=4"],
    "a_patch": ["trigger.cover=0.25"],
}
"""What a clean-label attack takes on digits, and patches as faint as these on 8×8 pixels; see above."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["refool", "a_blend", "svd", "wave", "dba", "cba", "edge_case", "wanet", "a_patch", "cl"]
)
def test_undefended_averaging_takes_the_backdoor(name: str, tmp_path: Path) -> None:
    """The default scenario without an eraser reaches an ASR of 0.9 in a round whose ACC is at least 0.8."""
    (tmp_path / "run").mkdir()
    config = compose_config([f"trigger={name}", "eraser=none", "engine.workers=1", *STRONGER.get(name, [])])
    execution.start(config, tmp_path / "run", ["fl-sim", "run"])
    rounds = tiny.events(tmp_path / "run", "round")
    assert max(event["asr"] for event in rounds if event["acc"] >= 0.8) >= 0.9
