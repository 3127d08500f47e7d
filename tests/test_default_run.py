"""The default run keeps the README's promise: one sees a backdoor rise, fall at each erasing, and rise again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from fl_sim import execution
from fl_sim.composing import compose_config

FRESH = (10_007, 20_011, 30_011, 40_009, 50_021)
"""Seeds that nobody has tuned with."""


def default_run(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    folder.mkdir()
    execution.start(compose_config(list(overrides)), folder, ["fl-sim", "run", *overrides])
    return tiny.events(folder)


def check_promise(events: list[dict[str, Any]], length: int = 30) -> None:
    """Every segment between erasings reaches ASR > 0.8 (`asr_before` counts), every erasing with
    `asr_before` ≥ 0.5 at least halves it and costs at most 0.15 ACC, final ACC > 0.85, under 90 s."""
    erasings = [event for event in events if event["event"] == "erase"]
    rounds = [event for event in events if event["event"] == "round"]
    assert [event["round"] for event in erasings] == list(range(10, length + 1, 10))
    assert len(rounds) == length
    begin = 0
    for erasing in erasings:
        segment = [event["asr"] for event in rounds if begin < event["round"] < erasing["round"]]
        assert max([*segment, erasing["asr_before"]]) > 0.8, f"no backdoor before round {erasing['round']}"
        assert erasing["accepted"]
        if erasing["asr_before"] >= 0.5:
            assert erasing["asr"] <= erasing["asr_before"] / 2, f"not erased in round {erasing['round']}"
            assert erasing["acc"] >= erasing["acc_before"] - 0.15, f"too costly in round {erasing['round']}"
        begin = erasing["round"]
    assert rounds[-1]["acc"] > 0.85
    assert sum(event["seconds"] for event in rounds) < 90


def test_the_default_run_shows_a_backdoor_rise_and_be_erased(tmp_path: Path) -> None:
    """One fresh seed of the five, its first two erasings."""
    check_promise(default_run(tmp_path / "run", f"seed={FRESH[0]}", "rounds=20"), 20)


def test_without_an_eraser_the_promise_is_not_met(tmp_path: Path) -> None:
    """The control: the same checker refuses runs without erasing and without an attack, whose ASR then stays low."""
    never = default_run(tmp_path / "never", f"seed={FRESH[0]}", "eraser=none", "rounds=12")
    assert max(event["asr"] for event in never if event["event"] == "round") > 0.8
    assert [event for event in never if event["event"] == "erase"] == []
    with pytest.raises(AssertionError):
        check_promise(never, 12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", FRESH)
def test_every_fresh_seed_keeps_the_promise(tmp_path: Path, seed: int) -> None:
    """Five of five."""
    check_promise(default_run(tmp_path / "run", f"seed={seed}"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", FRESH[:3])
def test_the_controls_of_the_default_run(tmp_path: Path, seed: int) -> None:
    """With `eraser=none` the ASR stays high to the end; with `attack=none` it stays near chance throughout."""
    kept = default_run(tmp_path / "kept", f"seed={seed}", "eraser=none")
    assert all(event["asr"] > 0.8 for event in kept[-5:])
    clean = default_run(tmp_path / "clean", f"seed={seed}", "attack=none")
    assert all(event["asr"] < 0.3 for event in clean if event["event"] == "round" and event["round"] >= 5)


@pytest.mark.slow
def test_the_same_seed_twice_gives_identical_metrics(tmp_path: Path) -> None:
    """At full size, too."""
    for name in ("one", "two"):
        default_run(tmp_path / name, f"seed={FRESH[1]}")
    assert tiny.numbers(tmp_path / "one") == tiny.numbers(tmp_path / "two")
