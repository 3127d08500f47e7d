"""The picture of every trigger."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fl_sim import gallery
from fl_sim.backdoor import Goal
from fl_sim.cli import main
from fl_sim.composing import choices, compose_config, conf_folder
from fl_sim.gallery import AMPLIFIED, SHOWN, Studio, makers, photographs, studio

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def room() -> Studio:
    return studio(photographs(16, crops=10), 4, Goal("auto"), 0)


class Half:
    """Adds one sixteenth to every pixel."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 / 16


class Broken:
    """Fails at its first image."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no ink\nat all")


def test_a_trigger_is_drawn_with_its_difference(room: Studio) -> None:
    """Where nothing is clamped the difference × 10 is 0.5 + 10/16, so white; ℓ2 of n pixels is √n/16."""
    drawn = room.draw("half", Half)
    assert list(drawn.rows) == ["clean", "stamped", f"× {AMPLIFIED}"]
    assert all(row.shape == (SHOWN, 3, 16, 16) for row in drawn.rows.values())
    assert torch.equal(drawn.rows["clean"], room.shown)
    torch.testing.assert_close(drawn.rows["stamped"], (room.shown + 1 / 16).clamp(0, 1))
    free = room.shown <= 1 - 1 / 16
    assert (drawn.rows[f"× {AMPLIFIED}"][free] == 1).all()
    assert drawn.numbers["linf"] == pytest.approx(1 / 16, abs=1e-6)
    assert 0 < drawn.numbers["l2"] <= (3 * 256) ** 0.5 / 16 + 1e-5


def test_what_fails_is_told_in_its_place(room: Studio) -> None:
    def unbuildable() -> Broken:
        raise RuntimeError("no such thing")

    assert room.draw("broken", Broken).failure == "no ink"
    assert room.draw("missing", unbuildable).failure == "no such thing"


def test_no_image_is_of_the_target_class(room: Studio) -> None:
    assert room.labels.tolist() == [1, 2, 3]
    other = studio(photographs(16, crops=10), 4, Goal("auto", target=2, source=1), 0)
    assert other.labels.tolist() == [0, 1, 3]


def test_the_photographs_are_four_different_scenes() -> None:
    data = photographs(16, crops=5)
    assert (data.train.images.shape, data.test.images.shape) == ((20, 3, 16, 16), (4, 3, 16, 16))
    assert data.train.labels.bincount().tolist() == [5] * 4
    assert torch.equal(data.train.images, photographs(16, crops=5).train.images)
    flat = data.test.images.float().flatten(1)
    assert torch.pdist(flat).min() > 500


def test_every_trigger_of_the_configuration_and_those_of_attacks_are_drawn() -> None:
    """All names of conf/trigger, whoever adds them, and the attacks that have `adopt`."""
    found = makers(compose_config([]), [conf_folder()], set())
    assert set(choices("trigger", [conf_folder()])) <= set(found)
    assert all(name.endswith(" (attack)") for name in set(found) - set(choices("trigger", [conf_folder()])))
    assert "model_replacement (attack)" not in found
    assert set(makers(compose_config(["trigger=dba"]), [conf_folder()], {"trigger"})) == {"dba"}
    assert set(makers(compose_config(["attack=none"]), [conf_folder()], {"attack"})) == set()


def test_the_command_draws_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One crafted and one that selects, on digits; what was asked for is what is drawn."""
    target = tmp_path / "page.png"
    assert main(["gallery", "trigger=cl", "trigger.steps=2", "data=digits", "-o", str(target)]) == 0
    assert target.read_bytes()[:8] == PNG
    assert "1 of 1 triggers" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_says_what_could_not_be_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is there all the same; the exit status is 1 only if nothing could be drawn."""
    monkeypatch.setattr(gallery, "makers", lambda *_: {"half": Half, "broken": Broken})
    assert main(["gallery", "-o", str(tmp_path / "page.png")]) == 0
    assert (tmp_path / "page.png").read_bytes()[:8] == PNG
    said = capsys.readouterr()
    assert "broken could not be drawn: no ink" in said.err
    assert "1 of 2 triggers" in said.out
    monkeypatch.setattr(gallery, "makers", lambda *_: {"broken": Broken})
    assert main(["gallery", "-o", str(tmp_path / "page.png")]) == 1


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["-o"], "-o"),
        (["-m"], "-m"),
        (["trigger=nothing"], "trigger"),
        (["backdoor.target=9"], "backdoor.target"),
        (["backdoor.rule=odd"], "backdoor.rule"),
    ],
)
def test_impossible_pages_are_refused(words: list[str], key: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2 and one line that names the key."""
    assert main(["gallery", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fl-sim: {key}")
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_the_whole_gallery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything there is can be drawn, on colour photographs and on grey digits of 8×8."""
    for words in ([], ["data=digits"]):
        assert main(["gallery", *words, "-o", str(tmp_path / "page.png")]) == 0
        assert capsys.readouterr().err == ""
