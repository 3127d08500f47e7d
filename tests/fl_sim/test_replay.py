"""`fl-sim replay`: a run once more, number for number."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import tiny

from fl_sim import execution
from fl_sim.cli import FAILED, OK, USAGE, main
from fl_sim.replay import circumstances, first_difference, prepared, replay

Capture = pytest.CaptureFixture[str]


def test_a_run_is_replayed_digit_for_digit(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves its folder as it was, and none behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    folder = tiny.run(tmp_path / "run", *tiny.ERASING)
    before = tiny.snapshot(folder)
    assert main(["replay", str(folder)]) == OK
    assert f"identical: all {len(tiny.events(folder))} events" in capsys.readouterr().out
    assert tiny.snapshot(folder) == before
    assert not list((tmp_path / "temporary").glob("fl-sim-*"))


def test_a_changed_number_is_found(tmp_path: Path, capsys: Capture) -> None:
    """The last digit of one number of the second round; what the clock says does not matter."""
    folder = tiny.run(tmp_path / "run")
    events = tiny.events(folder)
    for event in events:
        event["seconds"] = 1e6
    right = events[1]["loss"]
    events[1]["loss"] = wrong = right * (1 + 4e-16)
    assert right != wrong
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert main(["replay", str(folder)]) == FAILED
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"line 2, event 'round' of round 2: loss was {wrong}, is {right}" in said


@pytest.mark.slow
def test_a_centralized_run_trains_its_victim_again(tmp_path: Path) -> None:
    """From the kept victim of the first run, a replay would show nothing."""
    config = tiny.tiny("erasers=[fine_tune]", "central.epochs=2", f"output={tmp_path}")
    folder = tmp_path / "run"
    folder.mkdir()
    execution.start(config, folder, ["fl-sim", "central"])
    [kept] = (tmp_path / "victims").glob("*.pt")
    kept.write_bytes(b"damaged")
    assert main(["replay", str(folder)]) == OK
    assert kept.read_bytes() == b"damaged"


KEPT = Path(__file__).parents[2] / "docs" / "results" / "kept" / "digits_nad_201"


def test_the_published_numbers_are_those_of_the_kept_run() -> None:
    """Each row of the table in docs/results/digits.md, from the record that the page tells to replay."""
    page = (KEPT.parents[1] / "digits.md").read_text()
    assert f"fl-sim replay docs/results/kept/{KEPT.name}" in page
    erasings = [event for event in tiny.events(KEPT) if event["event"] == "erase"]
    assert [event["round"] for event in erasings] == [10, 20, 30]
    for event in erasings:
        asr, acc = (f"{event[f'{key}_before']:.3f} → {event[key]:.3f}" for key in ("asr", "acc"))
        assert f"| {event['round']} | {asr} | {acc} |" in page


@pytest.mark.slow
def test_the_published_run_is_replayed() -> None:
    """Digit for digit where versions and processor are those of then."""
    found = replay(KEPT)
    names = ("torch", "numpy", "python", "processor", "device")
    elsewhere = [each for each in found.circumstances if each.split(":")[0] in names]
    if elsewhere and found.difference is not None:
        pytest.skip(f"another machine: {'; '.join(elsewhere)}")
    assert found.difference is None


def test_what_is_not_as_it_was_is_said() -> None:
    """Versions, machine and device; not when it ran, by which words, or what is the same."""
    then = {"fl_sim": "0.0.9", "packages": {"torch": "2.11.0", "numpy": "2"}, "device": "cuda:0", "argv": ["x"]}
    now = {"fl_sim": "0.1.0", "packages": {"torch": "2.15.0", "numpy": "2"}, "device": "cpu", "argv": ["y"]}
    assert circumstances(then, now) == [
        "device: then cuda:0, now cpu",
        "fl_sim: then 0.0.9, now 0.1.0",
        "torch: then 2.11.0, now 2.15.0",
    ]
    assert circumstances(now, now) == []
    assert len(circumstances({}, now)) == 1


def test_a_replay_runs_on_the_device_of_then_and_tells_no_other_tracker() -> None:
    config = tiny.tiny() | {"tracker": {"_target_": "some.Tracker"}, "device": "auto"}
    changed = prepared(config, {"device": "cpu"}, Path("there"))
    assert (changed["device"], changed["tracker"], changed["output"]) == ("cpu", {}, "there")
    assert changed["choices"]["tracker"] == "none"
    assert prepared(config, {"device": "cuda:99"}, Path("there"))["device"] == "auto"


def test_first_differences() -> None:
    """By hand: a value, a sign of zero, a missing field, a missing event; the clock's fields never."""
    event = {"event": "round", "round": 1, "acc": 0.0, "seconds": 1.0}
    assert first_difference([event], [event | {"seconds": 2.0}]) is None
    assert "acc was 0.0, is -0.0" in str(first_difference([event], [event | {"acc": -0.0}]))
    assert "acc was 0.0, is missing" in str(first_difference([event], [{"event": "round", "round": 1}]))
    assert "asr was missing, is 1" in str(first_difference([event], [event | {"asr": 1}]))
    assert "has 2 events, the replay 1" in str(first_difference([event, event], [event]))
    assert "has 1 events, the replay 2" in str(first_difference([event], [event, event]))


def test_what_cannot_be_replayed_is_said_in_a_line(tmp_path: Path, capsys: Capture) -> None:
    folder = tiny.run(tmp_path / "run")
    (folder / "done").unlink()
    for words, status, said in (
        (["replay"], USAGE, "takes one run folder"),
        (["replay", str(tmp_path / "none")], USAGE, "no such folder"),
        (["replay", str(tmp_path)], USAGE, "is not a run folder"),
        (["replay", str(folder)], USAGE, "is not finished"),
    ):
        capsys.readouterr()
        assert main(words) == status
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1
