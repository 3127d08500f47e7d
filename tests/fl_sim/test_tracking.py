"""metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fl_sim.errors import RunError
from fl_sim.tracking import METRICS, JsonLines, plain, read_metrics


def written(folder: Path, *rounds: int) -> JsonLines:
    metrics = JsonLines(folder)
    for round_ in rounds:
        metrics.log("round", round=round_, acc=round_ / 10)
    return metrics


def test_one_plain_object_a_line(tmp_path: Path) -> None:
    metrics = JsonLines(tmp_path)
    metrics.log("round", round=1, acc=0.5, asr=None, accepted=True, eraser="nad")
    metrics.log("erase", round=1)
    metrics.close()
    assert (tmp_path / METRICS).read_text() == (
        '{"event": "round", "round": 1, "acc": 0.5, "asr": null, "accepted": true, "eraser": "nad"}\n'
        '{"event": "erase", "round": 1}\n'
    )


def test_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    metrics = JsonLines(tmp_path)
    metrics.log("round", loss=math.nan, high=math.inf, low=-math.inf, fine=0.25, zero=0)
    metrics.close()
    [event] = read_metrics(tmp_path)
    assert event == {"event": "round", "loss": None, "high": None, "low": None, "fine": 0.25, "zero": 0}
    assert plain("NaN") == "NaN"


def test_lines_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    metrics = written(tmp_path, 1)
    assert [event["round"] for event in read_metrics(tmp_path)] == [1]
    metrics.close()


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    metrics = JsonLines(tmp_path)
    metrics.log("round", third=1 / 3, tiny=1e-300)
    metrics.close()
    [event] = read_metrics(tmp_path)
    assert (event["third"], event["tiny"]) == (1 / 3, 1e-300)


def test_rewind_forgets_what_came_after_a_commit(tmp_path: Path) -> None:
    metrics = written(tmp_path, 1, 2)
    length = metrics.commit()
    assert length == (tmp_path / METRICS).stat().st_size
    metrics.log("round", round=3, acc=0.3)
    metrics.close()
    resumed = JsonLines(tmp_path)
    resumed.rewind(length, finished=2)
    resumed.log("round", round=3, acc=0.33)
    assert resumed.commit() == (tmp_path / METRICS).stat().st_size
    resumed.close()
    assert [(event["round"], event["acc"]) for event in read_metrics(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 0.33)]


def test_reopening_appends(tmp_path: Path) -> None:
    written(tmp_path, 1).close()
    written(tmp_path, 2).close()
    assert [event["round"] for event in read_metrics(tmp_path)] == [1, 2]


def test_rewinding_beyond_the_end_is_a_run_error(tmp_path: Path) -> None:
    metrics = written(tmp_path, 1)
    with pytest.raises(RunError, match="shorter than its checkpoint"):
        metrics.rewind(metrics.commit() + 1)
    metrics.close()


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.replace(b"\n", b"\n\n"),
        lambda text: text.splitlines(keepends=True)[0] * 3,
        lambda text: b"x" * (len(text) - 1) + b"\n",
        lambda text: b"".join(reversed(text.splitlines(keepends=True))),
        lambda text: b"[" * 100_000,
    ],
    ids=["CRLF", "BOM", "empty lines", "doubled", "garbage", "order", "deep"],
)
def test_an_edited_record_is_refused_and_left_as_it_is(tmp_path: Path, edit: Callable[[bytes], bytes]) -> None:
    metrics = written(tmp_path, 1, 2)
    length = metrics.commit()
    metrics.close()
    path = tmp_path / METRICS
    edited = edit(path.read_bytes())
    path.write_bytes(edited)
    resumed = JsonLines(tmp_path)
    with pytest.raises(RunError, match=r"it was edited|shorter"):
        resumed.rewind(length, finished=2)
    with pytest.raises(RunError):
        resumed.rewind(-1)
    resumed.close()
    assert path.read_bytes() == edited


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    written(tmp_path, 1, 2).close()
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes()[:-7])
    assert [event["round"] for event in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize(("line", "reason"), [("nonsense", "line 2 is not JSON"), ("[1]", "line 2 is not an event")])
def test_a_damaged_line_in_between_is_a_run_error(tmp_path: Path, line: str, reason: str) -> None:
    good = json.dumps({"event": "round"})
    (tmp_path / METRICS).write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(RunError, match=reason):
        list(read_metrics(tmp_path))


def test_a_pipe_in_its_place_is_no_record(tmp_path: Path) -> None:
    """Opening it would wait for ever."""
    os.mkfifo(tmp_path / METRICS)
    with pytest.raises(RunError, match=METRICS):
        JsonLines(tmp_path)
    with pytest.raises(RunError, match=METRICS):
        list(read_metrics(tmp_path))
