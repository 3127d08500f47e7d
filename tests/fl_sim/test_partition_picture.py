"""Pictures of partitions: what they count, whom they mark, and the command that draws them side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from fl_sim import execution
from fl_sim.cli import main
from fl_sim.partition.picture import HONEST, MALICIOUS, MOST, Counts, count, draw_partitions, title
from fl_sim.partition.shards import Shards

LABELS = np.random.default_rng(5).permutation(np.arange(3000) % 10)


def shows(path: Path, colour: str) -> int:
    """How many of a picture's pixels have exactly this colour."""
    pixels = np.round(imread(path)[..., :3] * 255)
    return int((pixels == np.round(np.array(to_rgb(colour)) * 255)).all(-1).sum())


def sharded(clients: int, malicious: frozenset[int] = frozenset()) -> Counts:
    shares = Shards(2, 0).split(LABELS, clients, np.random.default_rng(0))
    return Counts(count(shares, LABELS, 10), malicious)


def test_counts_are_samples_by_client_and_class() -> None:
    """Samples 0, 2 and 3 have classes 1, 0 and 1; the second client has none of class 2 either."""
    counted = count([np.array([0, 2, 3]), np.array([1])], np.array([1, 0, 0, 1]), 3)
    assert counted.tolist() == [[1, 2, 0], [1, 0, 0]]


def test_counts_of_a_run() -> None:
    """All of the clients' samples; malicious clients only where there is an attack."""
    world = execution.prepare(tiny.tiny("attack=none"))
    counts = Counts.of(world)
    assert counts.table.shape == (6, 4)
    assert counts.table.sum() == sum(len(share) for share in world.shares)
    labels = world.train.labels.numpy()[world.shares[2]]
    assert counts.table[2].tolist() == [int((labels == label).sum()) for label in range(4)]
    assert counts.malicious == frozenset()
    attacked = execution.prepare(tiny.tiny())
    assert Counts.of(attacked).malicious == attacked.malicious != frozenset()


@pytest.mark.parametrize("clients", [20, 1000])
def test_a_picture_marks_the_malicious(clients: int, tmp_path: Path) -> None:
    """A fifth of the bars is of the second colour; without malicious clients no pixel is. (Bars of 1,000 clients are
    narrower than a pixel, so that few pixels have the pure colour.)"""
    draw_partitions({"a": sharded(clients, frozenset(range(0, clients, 5)))}, tmp_path / "marked.png")
    draw_partitions({"a": sharded(clients)}, tmp_path / "plain.png")
    assert shows(tmp_path / "marked.png", MALICIOUS) > 100
    assert shows(tmp_path / "marked.png", HONEST) > shows(tmp_path / "marked.png", MALICIOUS)
    assert shows(tmp_path / "plain.png", MALICIOUS) == 0
    assert shows(tmp_path / "plain.png", HONEST) > 2000


def test_more_clients_than_pixels_are_cut_off(tmp_path: Path) -> None:
    """The first 1,000 are drawn whoever comes after them."""
    whole = sharded(MOST + 500)
    draw_partitions({"a": whole}, tmp_path / "many.png")
    draw_partitions({"a": Counts(whole.table[:MOST])}, tmp_path / "first.png")
    many, first = imread(tmp_path / "many.png"), imread(tmp_path / "first.png")
    above = int(0.9 * len(many))  # below stands the axis' label, which tells the difference
    assert np.array_equal(many[:above], first[:above])
    assert not np.array_equal(many, first)


def test_a_client_without_samples_and_a_class_without_members_can_be_drawn(tmp_path: Path) -> None:
    draw_partitions({"a": Counts(np.zeros((3, 2), dtype=np.int64))}, tmp_path / "empty.png")
    assert imread(tmp_path / "empty.png").size


def test_the_title_names_the_partition_and_its_settings() -> None:
    """Without what only describes it."""
    assert title(tiny.tiny("partition=shards", "partition.min_samples=3")) == (
        "shards · shards_per_client 2 · min_samples 3"
    )


# By the command line --------------------------------------------------------------------------------------------------


def test_every_partition_is_drawn_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One picture of all five: five times as high as that of one; a setting goes to those that have it."""
    every, one = tmp_path / "every.png", tmp_path / "one.png"
    assert main(["list", "partition", "--plot", "-o", str(every), "partition.min_samples=3", "clients=12"]) == 0
    assert main(["list", "partition", "--plot", "partition=quantity", "clients=12", "-o", str(one)]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [str(every), str(one)]
    assert shown.err == ""
    assert imread(every).shape[0] == 5 * imread(one).shape[0]


def test_a_partition_that_is_refused_does_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eleven of ten classes: one line on stderr, four pictures."""
    path = tmp_path / "four.png"
    assert main(["list", "partition", "--plot", "partition.classes_per_client=11", "-o", str(path)]) == 0
    assert capsys.readouterr().err.startswith("fl-sim: partition.classes_per_client=11: 20 clients must hold all 10")
    assert imread(path).shape[0] == 4 * 546


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["list", "--plot"], "--plot: is used as"),
        (["list", "model", "--plot"], "--plot: is used as"),
        (["list", "partition", "--plot", "-m"], "--plot: is used as"),
        (["list", "partition", "--plot", "-o"], "--plot: is used as"),
        (["list", "partition", "--plot", "partition.alhpa=1"], "partition.alhpa=1: unknown key; did you mean alpha?"),
        (["list", "partition", "--plot", "partition=iid", "partition.alpha=1"], "partition.alpha=1: unknown key"),
        (["list", "partition", "--plot", "clients=0"], "clients=0: must be"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"fl-sim: {complaint}")
    assert list(tmp_path.iterdir()) == []
