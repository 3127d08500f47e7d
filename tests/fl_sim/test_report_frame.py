"""`fl_sim.load_runs`: what a researcher gets in one line."""

from __future__ import annotations

from pathlib import Path

import made
import pytest

import fl_sim
from fl_sim.errors import ConfigError

pytest.importorskip("pandas")


def some(folder: Path) -> Path:
    """Two defenses by two seeds, two rounds each."""
    for eraser, asr in (("none", 0.9), ("nad", 0.1)):
        for seed in (0, 1):
            erase = [made.erase(2, (0.8, 0.9), (0.8, asr), eraser="nad")] if eraser == "nad" else []
            sections = {"eraser": (eraser, {"lr": 0.5}) if eraser == "nad" else eraser}
            scores = [(0.7, asr), (0.8, asr + seed / 100)]
            made.run(folder / f"{eraser}{seed}", seed, scores, *erase, clients=20, **sections)
    return folder


def test_a_row_for_each_run_with_its_configuration_and_its_numbers(tmp_path: Path) -> None:
    """The line that people write first: the mean by choice. Values keep their types."""
    runs = fl_sim.load_runs(some(tmp_path))
    assert len(runs) == 4
    assert runs.groupby("eraser")["asr"].mean().to_dict() == pytest.approx({"nad": 0.105, "none": 0.905})
    nad = runs[runs["eraser"] == "nad"].iloc[0]
    assert (nad["attack"], nad["eraser.lr"], nad["clients"], nad["seed"], nad["seeds.train"]) == (
        "model_replacement",
        0.5,
        20,
        0,
        0,
    )
    assert nad["folder"] == str(tmp_path / "nad0")
    assert bool(nad["finished"])
    assert not [column for column in runs if "_target_" in column or "paper" in column]


def test_a_row_for_each_round_or_erasing(tmp_path: Path) -> None:
    rounds = fl_sim.load_runs(some(tmp_path), events="round")
    assert len(rounds) == 8
    assert rounds[(rounds["eraser"] == "none") & (rounds["round"] == 2)]["asr"].tolist() == [0.9, 0.91]
    erasings = fl_sim.load_runs(tmp_path / "nad0", tmp_path / "nad1", events="erase")
    assert erasings["asr_before"].tolist() == [0.9, 0.9]
    assert erasings["seed"].tolist() == [0, 1]


def test_a_centralized_run_has_a_row_for_its_victim_and_one_for_each_eraser(tmp_path: Path) -> None:
    events = [{"event": "central", "round": 0, "method": "victim", "epoch": 1, "acc": 0.9, "asr": 1.0}]
    events += [made.erase(0, (0.9, 1.0), (0.8, 0.2), eraser="fine_tune")]
    made.write(tmp_path / "run", made.config(0, 3, eraser=("nad", {"lr": 0.5})), events, ["fl-sim", "central"])
    runs = fl_sim.load_runs(tmp_path)
    assert runs[["kind", "eraser", "asr"]].values.tolist() == [
        ["centralized", "none", 1.0],
        ["centralized", "fine_tune", 0.2],
    ]
    assert "eraser.lr" not in runs  # nad's, which was not tried


def test_what_is_left_out_is_warned_of_and_unknown_events_are_refused(tmp_path: Path) -> None:
    some(tmp_path)
    with pytest.raises(ConfigError, match="must be run, or an event of these runs: erase, round"):
        fl_sim.load_runs(tmp_path, events="rounds")
    with pytest.raises(ConfigError, match="no such folder"):
        fl_sim.load_runs(tmp_path / "none")
    (tmp_path / "nad0" / "metrics.jsonl").write_text("no\n")
    with pytest.warns(UserWarning, match="left out .*nad0: .*line 1 is not JSON"):
        assert len(fl_sim.load_runs(tmp_path)) == 3
    with (tmp_path / "nad1" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "round", "round": 9, "refused": 1, "asked": [1]}\n')
    with pytest.warns(UserWarning, match="nad1: its content can't be understood: TypeError"):
        assert len(fl_sim.load_runs(tmp_path)) == 2
