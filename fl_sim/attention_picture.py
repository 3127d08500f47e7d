"""What models look at before and after an erasing: attention maps A(F) = Σ_c F_c² of the same test images.

The maps are kept in `attention.pt` as soon as a model is there; the pictures are drawn when all numbers are safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fl_sim.attention import attention_map
from fl_sim.backdoor import Backdoor
from fl_sim.checkpoint import load_tensors, save_tensors
from fl_sim.console import warn
from fl_sim.models.classifier import Classifier
from fl_sim.randomness import generator
from fl_sim.samples import Samples, to_pixels
from fl_sim.writing import write_atomically

ALBUM, PICTURE = "attention.pt", "attention.png"
SHOWN, CHUNK = 4, 512
TILE = 96
"""A tile's side in pixels; as many to an inch."""
GAP = 26
"""What is left under each tile for the predicted class."""
MAP = "cividis"
"""Made for colour-blind readers; its brightness rises evenly, so it serves in grey, too (Nuñez et al. 2018)."""
RIGHT, OBEYED, ELSE = "#0072B2", "#D55E00", "0.35"  # distinct for colour-blind readers (Okabe & Ito 2008)

Picture: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """A picture is no result: whatever goes wrong with one is told, and the run goes on."""
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        warn(f"{what} failed: {type(error).__name__}: {reason}")


# What is kept ---------------------------------------------------------------------------------------------------------


def subjects(test: Samples, backdoor: Backdoor, seed: int) -> Samples:
    """A few test images that the attack is after, of different classes if there are enough, drawn by the seed."""
    order = torch.randperm(len(test), generator=generator(seed, "attention")).to(test.labels.device)
    at, labels = order[:0], list[int]()
    for part in order[backdoor.goal.victims(test.labels[order])].split(CHUNK):
        at = torch.cat([at, part[backdoor.victims(to_pixels(test.images[part]), test.labels[part])]])
        labels = test.labels[at].tolist()
        if len(set(labels)) >= SHOWN:
            break
    firsts = [index for index, label in enumerate(labels) if label not in labels[:index]]
    others = [index for index in range(len(labels)) if index not in firsts]
    return test[at[(firsts + others)[:SHOWN]]]


@torch.no_grad()
def seen(model: Classifier, pixels: Tensor) -> dict[str, Any]:
    """The normalised maps [B, H, W] at each tap, and the predicted classes; the model is left as it was."""
    was_training = model.training
    logits, taps = model.eval().with_taps(pixels)
    model.train(was_training)
    maps = [attention_map(tap).reshape(len(pixels), *tap.shape[2:]).cpu() for tap in taps]
    # Among NaN logits argmax finds class 0; an answer that is none is told as such.
    predicted = logits.argmax(1).masked_fill(~logits.isfinite().all(1), -1)
    return {"maps": maps, "predicted": predicted.cpu()}


class Album:
    """The chosen images, clean and stamped, and what each model so far sees in them; in a file, for a resumed run."""

    def __init__(self, folder: Path, test: Samples, backdoor: Backdoor, seed: int) -> None:
        self._path = folder / ALBUM
        self._test, self._backdoor, self._seed = test, backdoor, seed

    def start(self, name: str, model: Classifier) -> None:
        """The model before any erasing; whatever the file held is forgotten."""
        with harmless(f"keeping the attention of {name}"):
            self._path.unlink(missing_ok=True)
            chosen = subjects(self._test, self._backdoor, self._seed)
            if not len(chosen):
                return
            clean = to_pixels(chosen.images)
            content = {
                "pixels": torch.cat([clean, self._backdoor.stamp(clean)]).cpu(),
                "labels": chosen.labels.cpu(),
                "wanted": self._backdoor.goal.labels(chosen.labels, self._backdoor.classes).cpu(),
                "taps": list(model.taps),
                "views": {},
            }
            self._save(content, name, model)

    def add(self, name: str, model: Classifier) -> None:
        """Another model, beside those that are there."""
        with harmless(f"keeping the attention of {name}"):
            if self._path.exists():
                self._save(load_tensors(self._path), name, model)

    def _save(self, content: dict[str, Any], name: str, model: Classifier) -> None:
        content["views"][name] = seen(model, content["pixels"].to(self._test.labels.device))
        save_tensors(self._path, content)


# The pictures ---------------------------------------------------------------------------------------------------------


def draw_attention(folder: Path) -> None:
    """One picture of all models at the last tap, and one for each model after the first, beside it, at every tap."""
    if not (folder / ALBUM).exists():
        return
    with harmless("drawing the attention maps"):
        album = load_tensors(folder / ALBUM)
        before, *erased = album["views"]
        shapes = [map_.shape[1:] for map_ in album["views"][before]["maps"]]
        taps = [f"{name}: {high}×{wide}" for name, (high, wide) in zip(album["taps"], shapes, strict=True)]
        last = len(taps) - 1
        _draw(folder / PICTURE, album, [(name, name, last) for name in album["views"]], f"last tap, {taps[last]}")
        for name in erased:
            both = [(f"{model}\n{tap}", model, at) for at, tap in enumerate(taps) for model in (before, name)]
            _draw(folder / f"attention_{name}.png", album, both, f"{before} and {name} at every tap")


def _draw(path: Path, album: Mapping[str, Any], columns: Sequence[tuple[str, str, int]], what: str) -> None:
    """A row for each image, clean and below it stamped; a column of the images and one for each (title, model, tap)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported late: it takes half a second
    from matplotlib.figure import Figure

    labels, wanted = album["labels"].tolist(), album["wanted"].tolist()
    rows = [(image, stamped) for image in range(len(labels)) for stamped in (False, True)]
    at = [image + stamped * len(labels) for image, stamped in rows]
    mosaic = np.ones((len(rows) * (TILE + GAP), (len(columns) + 1) * (TILE + 4), 3), np.float32)
    images = [_coloured(album["pixels"][index]) for index in at]
    for row, index in enumerate(at):
        _put(mosaic, row, 0, images[row])
        for column, (_, model, tap) in enumerate(columns, start=1):
            _put(mosaic, row, column, _overlaid(images[row], album["views"][model]["maps"][tap][index]))
    left, top, foot = 78, 66, 44
    height, width = mosaic.shape[0] + top + foot, max(mosaic.shape[1] + left + 8, 560)
    figure = Figure(figsize=(width / TILE, height / TILE), dpi=TILE)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((left / width, foot / height, mosaic.shape[1] / width, mosaic.shape[0] / height))
    axes.set_axis_off()
    axes.imshow(mosaic, interpolation="nearest", aspect="auto", extent=(0, mosaic.shape[1], mosaic.shape[0], 0))
    for column, title in enumerate(["image", *(title for title, *_ in columns)]):
        axes.text(column * (TILE + 4) + TILE / 2, -6, title, fontsize=8.5, ha="center", va="bottom")
    for row, (image, stamped) in enumerate(rows):
        y = row * (TILE + GAP)
        axes.text(-6, y + TILE / 2, "stamped" if stamped else "clean", fontsize=8.5, ha="right", va="center")
        axes.text(TILE / 2, y + TILE + 2, f"class {labels[image]}", fontsize=8.5, ha="center", va="top")
        for column, (_, model, _tap) in enumerate(columns, start=1):
            answer = int(album["views"][model]["predicted"][at[row]])
            text, colour = _answer(answer, labels[image], wanted[image])
            place = (column * (TILE + 4) + TILE / 2, y + TILE + 2)
            axes.text(*place, text, fontsize=8.5, ha="center", va="top", color=colour, weight="bold")
    figure.text(0.01, 1 - 6 / height, f"Attention Σ F² · {what}", fontsize=10, weight="bold", va="top")
    legend = "Under each map the class that the model answers: ✓ right, ! what the attacker wants.\n"
    legend += "Dark blue: the least of a map; bright yellow: its most. Maps are enlarged to the image."
    figure.text(0.01, 6 / height, legend, fontsize=7.5, va="bottom", color="0.3")
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, lambda file: file.write(picture.getvalue()))


def _answer(answer: int, label: int, wanted: int) -> tuple[str, str]:
    """A predicted class in words and its colour."""
    if answer < 0:
        return "none (NaN)", ELSE
    if answer == label:
        return f"{answer} ✓", RIGHT
    return (f"{answer} !", OBEYED) if answer == wanted else (str(answer), ELSE)


def _put(mosaic: Picture, row: int, column: int, tile: Picture) -> None:
    mosaic[row * (TILE + GAP) : row * (TILE + GAP) + TILE, column * (TILE + 4) : column * (TILE + 4) + TILE] = tile


def _coloured(pixels: Tensor) -> Picture:
    """An image as an RGB tile, its pixels as squares."""
    tile: Picture = F.interpolate(pixels[None], size=(TILE, TILE))[0].expand(3, -1, -1).permute(1, 2, 0).numpy()
    return tile


def _overlaid(image: Picture, map_: Tensor) -> Picture:
    """A map on the grey image, smoothly enlarged and stretched from its least to its most."""
    from matplotlib import colormaps

    large = F.interpolate(map_.nan_to_num()[None, None], size=(TILE, TILE), mode="bilinear", align_corners=False)[0, 0]
    spread = float(large.max() - large.min())
    heat = colormaps[MAP](((large - large.min()) / spread if spread else torch.zeros_like(large)).numpy())[..., :3]
    overlaid: Picture = (0.25 * image.mean(2, keepdims=True) + 0.75 * heat).astype(np.float32)
    return overlaid
