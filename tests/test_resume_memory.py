"""A run in which everything remembers, private teachers, PBE's generators and a watching policy, resumes exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fl_sim import execution
from fl_sim.protocols import Signals
from fl_sim.rounds import Federation
from server.app import GridExchange

WORDS = (
    *("client=fed_nad", "client.lr=0.01", "rounds=7", "data.clean_fraction=0.1", "sampler=fixed_malicious"),
    *("threat=every", "threat.rounds=2", "threat.first=3", "attack.boost=5"),
    *("eraser=pbe", "eraser.epochs=1", "eraser.min_steps=3", "eraser.warm_up=2", "eraser.latent=8"),
    *("erasing=on_suspicion", "erasing.patience=1", "erasing.floor=0"),
)
"""Three shots, in rounds 3, 5 and 7, each of them noticed: each erasing has the generators of the one before."""
CUT = 5
"""Interrupted after this round's training, aggregation and erasing; its checkpoint is the one of the round before."""


class Interrupted(BaseException):
    """Stands for Ctrl-C or a crash."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        tiny.draw_nothing(patch)
        return tiny.run(tmp_path_factory.mktemp("whole") / "run", *WORDS)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    original = Federation._save

    def breaking(self: Federation, t: int) -> None:
        if t == CUT:
            raise Interrupted
        original(self, t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "_save", breaking)
        with pytest.raises(Interrupted):
            tiny.run(tmp_path / "broken", *WORDS)
    return tmp_path / "broken"


def equal(left: Any, right: Any) -> bool:
    """Bit for bit, through mappings, leaving out what a clock decides."""
    if isinstance(left, Mapping):
        names = [name for name in left if "seconds" not in str(name)]
        return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in names)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else bool(left == right)


def test_the_run_is_one_in_which_everything_remembers(whole: Path, broken: Path) -> None:
    """Erasings on both sides of the interruption, by suspicion; generators in the checkpoint; teachers in files."""
    erased = [event["round"] for event in tiny.events(whole, "erase")]
    assert erased == [3, 5, 7]
    assert all(event["cause"] != "due" and event["accepted"] for event in tiny.events(whole, "erase"))
    checkpoint = torch.load(broken / "checkpoint.pt")
    assert checkpoint["round"] == CUT - 1
    assert {name.split(".")[0] for name in checkpoint["states"]["eraser"]} == {"images", "patches"}
    assert len(checkpoint["signals"]["steps"]) == CUT - 1
    teachers = [torch.load(path) for path in (broken / "clients").iterdir()]
    assert teachers
    assert all(set(teacher) == {"teacher"} for teacher in teachers)


def test_it_goes_on_bit_for_bit(whole: Path, broken: Path) -> None:
    """Metrics, global model, teachers, generators and signals are those of the run that nobody interrupted."""
    execution.resume(broken)
    assert tiny.numbers(broken) == tiny.numbers(whole)
    names = sorted(path.name for path in (whole / "clients").iterdir())
    assert names == sorted(path.name for path in (broken / "clients").iterdir())
    for name in ("model.pt", "model_before_erasing.pt", "checkpoint.pt", *(f"clients/{name}" for name in names)):
        ours, theirs = torch.load(broken / name), torch.load(whole / name)
        for each in (ours, theirs):
            each.pop("metrics_length", None)  # lines hold seconds, so their length varies
        assert equal(ours, theirs), name


@pytest.mark.parametrize("lost", ["eraser", "signals", "teachers"])
def test_what_would_be_lost_would_show(whole: Path, broken: Path, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a checkpoint without one of the three memories gives other numbers."""
    checkpoint = torch.load(broken / "checkpoint.pt")
    if lost == "eraser":
        checkpoint["states"]["eraser"] = {}
    elif lost == "signals":
        checkpoint["signals"] = asdict(Signals())
    else:
        monkeypatch.setattr(GridExchange, "restore", lambda self, states: None)
    torch.save(checkpoint, broken / "checkpoint.pt")
    execution.resume(broken)
    assert tiny.numbers(broken) != tiny.numbers(whole)
