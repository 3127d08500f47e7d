"""Centralized baselines refuse what a federated run refuses: an erased model that diverged, or lost the clean task."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from defenses.erasing.reinit_head import ReinitHead
from fl_sim.cli import OK, main
from fl_sim.composing import compose_config

LEARNT = ("data.difficulty=0.1", "central.epochs=8", "central.batch_size=32", "central.track.every=null")
"""A victim that is right, which it takes to see that an erased model is not."""


def erasings(folder: Path) -> list[dict[str, Any]]:
    [done] = folder.rglob("done")
    return tiny.events(done.parent, "erase")


@pytest.mark.parametrize(
    "erasers", [["nad", "argd", "anp"], pytest.param(None, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_erasers_that_diverge_are_refused_and_recorded(
    erasers: list[str] | None, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each eraser that has a rate, at a rate of 1e6: none raises, and none is accepted but those that choose what to
    prune by its cost on held-out clean images, and then rather prune nothing."""
    original, rates = compose_config, ("lr", "recovery_lr", "unlearning_lr")
    quick: dict[str, Any] = {"epochs": 1, "min_steps": 4, "steps": 4, "warm_up": 2, "teacher_epochs": 1}
    quick |= {"unlearning_epochs": 1, "unlearning_min_steps": 4, "recovery_epochs": 1}

    def composed(overrides: Any) -> Any:
        config = original(overrides)
        for section in config["erasers"].values():
            for part in (section, section.get("inversion", {})):
                part |= {key: value for key, value in quick.items() if key in part}
            section |= {key: 1e6 for key in rates if key in section}
        return config

    monkeypatch.setattr("fl_sim.composing.compose_config", composed)
    sections = original(["erasers=all"])["erasers"]
    trained = erasers or [name for name, section in sections.items() if any(key in section for key in rates)]
    assert main(["central", *tiny.TINY, *LEARNT, f"erasers=[{','.join(trained)}]"]) == OK
    found = erasings(cwd / "runs")
    assert [event["eraser"] for event in found] == trained
    assert all(event["acc_before"] > 0.8 for event in found)
    kept = [event for event in found if event["accepted"]]
    assert {event["eraser"] for event in kept} <= {"anp", "rnp"}
    assert all(event["acc"] > 0.6 for event in kept)
    refused = [event for event in found if not event["accepted"]]
    assert all("NaN" in event["reason"] or "clean-set accuracy fell" in event["reason"] for event in refused)


def test_an_eraser_that_only_ruins_the_accuracy_is_refused_as_in_a_run(
    cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head of zeros answers class 0, a quarter of the clean set, below half of the victim's: refused, and still
    scored. With a floor of nothing it is taken."""

    def zeroing(self: ReinitHead, model: Any, clean: object, state: object, ctx: object) -> tuple[Any, dict[str, Any]]:
        copy = deepcopy(model)
        torch.nn.init.zeros_(copy.head.weight)
        torch.nn.init.zeros_(copy.head.bias)
        return copy, {}

    monkeypatch.setattr(ReinitHead, "erase", zeroing)
    for floor, accepted in (("0.5", False), ("0.0", True)):
        line = ["central", *tiny.TINY, *LEARNT, "eraser=reinit_head", f"erasing.floor={floor}", f"output={floor}"]
        assert main(line) == OK
        [event] = erasings(cwd / floor)
        assert event["accepted"] is accepted
        assert ("clean-set accuracy fell" in event.get("reason", "")) is not accepted
        assert event["acc_before"] > 0.8
        assert event["acc"] < 0.4


def test_a_victim_of_nan_is_told_as_such_and_nothing_is_tried_on_it(cwd: Path) -> None:
    """As in a federated run: no ASR and no RA; erasers, one of which decomposes the weights, are refused unasked."""
    line = ["central", *tiny.TINY, "central.epochs=1", "central.lr=1e6", "central.track.every=null"]
    assert main([*line, "erasers=[clp,fine_tune]"]) == OK
    [done] = (cwd / "runs").rglob("done")
    summary = json.loads((done.parent / "summary.json").read_text())
    assert (summary["asr"], summary["ra"]) == (None, None)
    found = erasings(cwd / "runs")
    assert [event["eraser"] for event in found] == ["clp", "fine_tune"]
    assert all(not event["accepted"] and "NaN" in event["reason"] and event["asr"] is None for event in found)
