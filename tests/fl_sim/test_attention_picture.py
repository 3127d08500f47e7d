"""Attention maps before and after erasing: what is kept, which images, and that no picture can harm a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from matplotlib.image import imread
from toys import seeded, small_model, spotted, white_backdoor

from fl_sim import attention_picture
from fl_sim.attention import attention_map
from fl_sim.attention_picture import TILE, Album, draw_attention, seen, subjects
from fl_sim.checkpoint import load_tensors
from fl_sim.cli import OK, main
from fl_sim.samples import Samples

pytestmark = pytest.mark.drawn
QUICK = (*tiny.TINY, "central.epochs=1", "central.batch_size=32")


def test_the_images_are_victims_of_different_classes_drawn_by_the_seed() -> None:
    """Of four classes three are not the target: one image each, then a second of some class; all of one where no other
    is attacked; few where there are few."""
    test = spotted(40)
    chosen = subjects(test, white_backdoor(), 0)
    assert len(chosen) == 4
    assert set(chosen.labels[:3].tolist()) == {1, 2, 3}
    assert 0 not in chosen.labels
    assert torch.equal(chosen.images, subjects(test, white_backdoor(), 0).images)
    assert not torch.equal(chosen.images, subjects(test, white_backdoor(), 1).images)
    assert subjects(test, white_backdoor("source_specific", source=2), 0).labels.tolist() == [2, 2, 2, 2]
    assert len(subjects(test[:3], white_backdoor(), 0)) == 2


def test_what_is_seen_is_the_normalised_map_of_each_tap() -> None:
    """The maps of the loss, as squares; the model stays in its mode; an answer of NaN is none."""
    model, pixels = small_model().train(), torch.rand(3, 1, 8, 8, generator=seeded())
    view = seen(model, pixels)
    assert model.training
    with torch.no_grad():
        logits, taps = model.eval().with_taps(pixels)
    assert [tuple(map_.shape) for map_ in view["maps"]] == [(3, 8, 8), (3, 4, 4), (3, 2, 2)]
    for map_, tap in zip(view["maps"], taps, strict=True):
        assert torch.equal(map_.flatten(1), attention_map(tap))
    assert torch.equal(view["predicted"], logits.argmax(1))
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    assert seen(model, pixels)["predicted"].tolist() == [-1, -1, -1]


def test_a_picture_of_all_models_and_one_of_each_erased(tmp_path: Path) -> None:
    """Of all models at the last tap; of each erased one, beside the victim, at all three."""
    album = Album(tmp_path, spotted(40), white_backdoor(), 0)
    for seed, name in enumerate(("victim", "nad", "clp")):
        (album.start if name == "victim" else album.add)(name, small_model(seed))
    draw_attention(tmp_path)
    sizes = {path.name: imread(path).shape[:2] for path in tmp_path.glob("*.png")}
    assert set(sizes) == {"attention.png", "attention_nad.png", "attention_clp.png"}
    assert sizes["attention_nad.png"] == sizes["attention_clp.png"]
    assert min(width for _, width in sizes.values()) > 4 * TILE
    assert all(height > 8 * TILE for height, _ in sizes.values())
    views = load_tensors(tmp_path / "attention.pt")["views"]
    assert list(views) == ["victim", "nad", "clp"]


def test_the_trigger_is_where_the_bright_spot_is() -> None:
    """A map that is 0 but at its lower right quarter gives a tile that is brightest there, and evenly dark above."""
    map_ = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    tile = attention_picture._overlaid(np.zeros((TILE, TILE, 3), np.float32), map_)
    brightness = tile.mean(2)
    half = TILE // 2
    assert brightness[half:, half:].mean() > 2 * brightness[:half, :half].mean()
    assert np.ptp(attention_picture._overlaid(np.zeros((TILE, TILE, 3), np.float32), torch.ones(2, 2)).mean(2)) < 1e-6


def test_a_test_set_without_victims_has_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is stamped, so nothing is drawn, and an older file is gone."""
    (tmp_path / "attention.pt").write_bytes(b"old")
    only_target = Samples(torch.zeros(5, 1, 8, 8), torch.zeros(5, dtype=torch.long))
    album = Album(tmp_path, only_target, white_backdoor(), 0)
    album.start("victim", small_model())
    album.add("nad", small_model(1))
    draw_attention(tmp_path)
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().err


def test_a_central_run_has_its_pictures(cwd: Path) -> None:
    """The victim and the eraser on the same images; the victim's answers are its own, and so are the eraser's."""
    assert main(["central", *QUICK, "eraser=clp"]) == OK
    [done] = (cwd / "runs").rglob("done")
    names = {path.name for path in done.parent.glob("attention*")}
    assert names == {"attention.pt", "attention.png", "attention_clp.png"}
    assert list(load_tensors(done.parent / "attention.pt")["views"]) == ["victim", "clp"]


def test_a_federated_run_shows_its_last_erasing(tmp_path: Path) -> None:
    """Erased after each of three rounds: the maps are those of the last pair of models."""
    from fl_sim.build import to_text, world_of

    folder = tiny.run(tmp_path / "run", *tiny.ERASING, "erasing.rounds=1")
    assert (folder / "attention_fine_tune.png").exists()
    views = load_tensors(folder / "attention.pt")
    assert list(views["views"]) == ["before", "fine_tune"]
    model = world_of(to_text(tiny.tiny())).new_model()
    for name, file in (("before", "model_before_erasing.pt"), ("fine_tune", "model.pt")):
        model.load_state_dict(load_tensors(folder / file))
        again = seen(model.eval(), views["pixels"])
        assert torch.equal(again["predicted"], views["views"][name]["predicted"])
        pairs = zip(again["maps"], views["views"][name]["maps"], strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("broken", ["seen", "_draw"])
def test_a_failing_picture_harms_nothing(
    broken: str, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the maps or the drawing fail: status 0, the numbers of an undisturbed run, and one line that says so."""
    words = ["central", *QUICK, "eraser=clp"]
    assert main([*words, "output=whole"]) == OK

    def failing(*_: Any, **__: Any) -> None:
        raise ValueError("no ink\nat all")

    monkeypatch.setattr(attention_picture, broken, failing)
    assert main([*words, "output=broken"]) == OK
    assert "ValueError: no ink\n" in capsys.readouterr().err
    folders = [next((cwd / name).rglob("done")).parent for name in ("whole", "broken")]
    assert tiny.numbers(folders[0]) == tiny.numbers(folders[1])
    assert json.loads((folders[1] / "summary.json").read_text())["erasers"]
    assert not list(folders[1].glob("attention*.png"))
