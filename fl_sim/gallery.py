"""A picture of every trigger on the same images: clean, stamped, their difference, and how far they are apart."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from fl_sim.backdoor import Backdoor, Goal
from fl_sim.build import component
from fl_sim.composing import Config, choices
from fl_sim.data.dataset import Dataset, resized
from fl_sim.errors import ConfigError, RunError
from fl_sim.models.classifier import Classifier, build_classifier
from fl_sim.models.cnn import Cnn
from fl_sim.protocols import Crafting, Learned, Selecting, State, Trigger, Workshop
from fl_sim.randomness import generator
from fl_sim.samples import Samples, to_pixels
from fl_sim.schema import construct, convert
from fl_sim.similarity import distances
from fl_sim.training import fit, sgd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 3
"""How many images each trigger is drawn on."""
LESSONS = 5
"""How often a trigger that learns may learn: as an attacker in so many rounds would."""
AMPLIFIED = 10
ACROSS = 6
PAPER = 0.95
"""The grey of the page, on which white images stand out."""
Maker = Callable[[], Trigger]


@dataclass(frozen=True)
class Drawn:
    """One trigger on the images, or the reason why it could not be drawn."""

    name: str
    rows: Mapping[str, Tensor]
    numbers: Mapping[str, float]
    failure: str | None = None


@dataclass(frozen=True)
class Studio:
    """What triggers are drawn with: images, the attacker's own samples and a model trained on them."""

    shown: Tensor
    labels: Tensor
    own: Samples
    model: Classifier
    goal: Goal
    classes: int
    seed: int

    def draw(self, name: str, maker: Maker) -> Drawn:
        """A trigger on the images, once it has learned what it has to learn; whatever goes wrong is told."""
        try:
            return self._drawn(name, maker())
        except Exception as error:  # a trigger of one's own may fail in any way, and must not hide the others
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return Drawn(name, {}, {}, reason)

    def _drawn(self, name: str, trigger: Trigger) -> Drawn:
        if hasattr(trigger, "check"):
            trigger.check(tuple(self.shown.shape[1:]))
        goal = self.goal.resolved(trigger)
        record: State = {}
        if isinstance(trigger, Learned):
            for lesson in range(LESSONS):
                record = trigger.learn(self.own, self._workshop(goal, name, lesson, record))
                learned = trigger.recall(record)
                assert isinstance(learned, Learned)
                trigger = learned
        shown = self.shown
        if isinstance(trigger, Selecting):
            shown = self._carrying(trigger, goal)
            return Drawn(name, {"carry it": shown}, distances(shown, shown))
        stamped = Backdoor(trigger, goal, self.classes).stamp(shown)
        rows = {"clean": shown, "stamped": stamped, f"× {AMPLIFIED}": (0.5 + AMPLIFIED * (stamped - shown)).clamp(0, 1)}
        if isinstance(trigger, Crafting):
            shop = self._workshop(goal, name, LESSONS, record)
            crafted = trigger.craft(shown, self.labels, shop).detach().clamp(0, 1)
            rows |= {} if torch.equal(crafted, stamped) else {"trained on": crafted}
        return Drawn(name, rows, distances(shown, stamped))

    def _workshop(self, goal: Goal, name: str, lesson: int, record: State) -> Workshop:
        rng = generator(self.seed, "gallery", name, lesson)
        return Workshop(deepcopy(self.model), goal, self.classes, rng, rank=0, attackers=4, record=record)

    def _carrying(self, trigger: Selecting, goal: Goal) -> Tensor:
        """Own images that carry a natural trigger, for nothing is stamped on others."""
        pixels = to_pixels(self.own[goal.victims(self.own.labels).nonzero().flatten()].images)
        at = trigger.selects(pixels).nonzero().flatten()
        if not len(at):
            raise RunError("none of the images carries this natural trigger")
        return pixels[at[torch.linspace(0, len(at) - 1, SHOWN).long()]]


def studio(data: Dataset, classes: int, goal: Goal, seed: int) -> Studio:
    """A model trained for seconds, and the test images to draw on: one each of the first classes but the target."""
    rng = generator(seed, "gallery")
    own = data.train[torch.randperm(len(data.train), generator=rng)[:400]]
    images = data.test.images
    pixels = to_pixels(own.images)
    mean, std = (each.tolist() for each in (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp(min=1e-3)))
    model = build_classifier(Cnn(), tuple(images.shape[1:]), classes, mean, std, rng)  # type: ignore[arg-type]
    fit(model, own, sgd(model, 0.05, momentum=0.9), epochs=8, batch_size=50, rng=rng)
    model.eval().requires_grad_(False)
    firsts = [(data.test.labels == label).nonzero().flatten()[:1] for label in range(classes) if label != goal.target]
    at = torch.cat(firsts)[:SHOWN]
    if len(at) < SHOWN:
        at = (data.test.labels != goal.target).nonzero().flatten()[:SHOWN]
    return Studio(to_pixels(images[at]), data.test.labels[at], own, model, goal, classes, seed)


SCENES = (
    ("flower.jpg", 0, 0, 400, 170),  # leaves
    ("china.jpg", 20, 50, 400, 330),  # a tower
    ("china.jpg", 130, 340, 427, 640),  # trees by a lake
    ("flower.jpg", 70, 155, 385, 465),  # a dahlia
)
"""Four classes: parts of the photographs, as top, left, bottom and right."""


def photographs(size: int, crops: int = 100) -> Dataset:
    """Crops of the two photographs inside scikit-learn, which are there offline; the middle of each scene for testing.

    Training crops are squares of 60 to 100 % of the scene's, anywhere in it.
    """
    from sklearn.datasets import load_sample_image

    rng = generator(0, "gallery", "photographs")
    train, test = [], []
    for name, top, left, bottom, right in SCENES:
        whole = torch.from_numpy(np.array(load_sample_image(name)))[top:bottom, left:right].permute(2, 0, 1)[None]
        height, width = whole.shape[2:]
        side = min(height, width)
        test.append(_cropped(whole, (height - side) // 2, (width - side) // 2, side, size))
        for share, down, across in torch.rand(crops, 3, generator=rng).tolist():
            part = round(side * (0.6 + 0.4 * share))
            train.append(_cropped(whole, int(down * (height - part)), int(across * (width - part)), part, size))
    labels = torch.arange(len(SCENES))
    return Dataset(Samples(torch.cat(train), labels.repeat_interleave(crops)), Samples(torch.cat(test), labels))


def _cropped(image: Tensor, top: int, left: int, side: int, size: int) -> Tensor:
    return resized(image[:, :, top : top + side, left : left + side], size)


def draw(config: Config, given: set[str], folders: Sequence[Path], path: Path) -> list[Drawn]:
    """Draw what a configuration asks for and save the page; returns what was drawn and what was not.

    `given` are the keys that were set: with `data` the page shows that data set instead of the photographs, with
    `trigger` or `attack` only what was chosen.
    """
    about, data, classes = _data(config, given)
    try:
        goal: Goal = construct(Goal, config["backdoor"])
        goal.check(classes)
    except ConfigError as error:
        raise error.within("backdoor") from error
    room = studio(data, classes, goal, convert("seed", config["seed"], int))
    only = {key.split(".")[0] for key in given} & {"trigger", "attack"}
    drawn = [room.draw(name, maker) for name, maker in makers(config, folders, only).items()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(drawn, path, about)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be written: {error}") from error
    return drawn


def _data(config: Config, given: set[str]) -> tuple[str, Dataset, int]:
    """What the page says of the images, the images, and the number of classes."""
    section = config["data"]
    source = component("data", section)
    if any(key.split(".")[0] == "data" and key != "data.image_size" for key in given):
        try:
            return f"On test images of {config['choices']['data']}", source.load(), source.facts.classes
        except ConfigError as error:
            raise error.within("data") from error
    size = section["image_size"] if "data.image_size" in given else 32
    return f"On crops of two photographs, {size}×{size} pixels", photographs(size), len(SCENES)


def makers(config: Config, folders: Sequence[Path], only: set[str]) -> dict[str, Maker]:
    """How to build each trigger that can be chosen, and those that attacks bring; of `only` these groups the chosen."""

    def sections(group: str) -> dict[str, Any]:
        if only:
            return {config["choices"][group]: config[group]} if group in only else {}
        return {name: OmegaConf.to_container(OmegaConf.load(path)) for name, path in choices(group, folders).items()}

    def of_attack(given: Any) -> Maker | None:
        if not given or "_target_" not in given:
            return None
        try:
            attack = component("attack", given, {"client": component("client", config["client"])})
        except ConfigError as error:
            return _failing(error)
        return (lambda: attack.adopt(component("trigger", config["trigger"]))) if hasattr(attack, "adopt") else None

    found: dict[str, Maker] = {
        name: partial(component, "trigger", given) for name, given in sections("trigger").items()
    }
    brought = {f"{name} (attack)": of_attack(given) for name, given in sections("attack").items()}
    return found | {name: maker for name, maker in brought.items() if maker is not None}


def _failing(error: Exception) -> Maker:
    def fail() -> Trigger:
        raise error

    return fail


# The page -------------------------------------------------------------------------------------------------------------


def save(drawn: Sequence[Drawn], path: Path, about: str) -> None:
    """All of them on one page, `ACROSS` beside each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported late: it takes half a second
    from matplotlib.figure import Figure

    across = min(ACROSS, len(drawn))
    rows = [drawn[start : start + across] for start in range(0, len(drawn), across)]
    legend = (
        f"{about}. × {AMPLIFIED}: stamped minus clean, {AMPLIFIED} times: grey is unchanged, lighter is brighter, "
        "darker darker. Trained on: poisoned training images, where they differ. Carry it: nothing is stamped. "
        "ℓ∞ in steps of 1/255, ℓ2 of pixels in [0, 1], SSIM 1 if equal (its window barely reaches the corners); "
        "means over the images."
    )
    # In inches: a picture, the margins of a block, and of the page.
    tile, left, head, foot = 0.72, 0.78, 0.28, 0.42
    width = max(across * (left + SHOWN * tile) + 0.25, 7.0)
    lines = textwrap.wrap(legend, int(width * 13.5))
    top = 0.6 + 0.15 * len(lines)
    heights = [head + foot + tile * max(3, *(len(each.rows) for each in row)) for row in rows]
    height = top + sum(heights) + 0.1
    figure = Figure(figsize=(width, height), facecolor=(PAPER,) * 3)
    FigureCanvasAgg(figure)
    figure.text(0.12 / width, 1 - 0.28 / height, "Triggers", fontsize=16, weight="bold", va="center")
    figure.text(0.12 / width, 1 - 0.46 / height, "\n".join(lines), fontsize=8.5, va="top", color="0.3")
    y = height - top
    for row, tall in zip(rows, heights, strict=True):
        for column, each in enumerate(row):
            count = max(len(each.rows), 1)
            x = column * (left + SHOWN * tile) + left
            bottom = y - head - count * tile
            axes = figure.add_axes((x / width, bottom / height, SHOWN * tile / width, count * tile / height))
            _block(axes, each)
        y -= tall
    figure.savefig(path, dpi=130)


def _block(axes: Axes, drawn: Drawn) -> None:
    axes.set_axis_off()
    axes.set_title(drawn.name, fontsize=10.5, weight="bold", pad=4, loc="left")
    if drawn.failure is not None:
        reason = "\n".join(textwrap.wrap(f"could not be drawn: {drawn.failure}", 30)[:8])
        axes.text(0, 1, reason, fontsize=8, va="top", color="0.35", transform=axes.transAxes)
        return
    axes.imshow(_tiled(list(drawn.rows.values())), interpolation="nearest", aspect="auto")
    for index, label in enumerate(drawn.rows):
        at = 1 - (index + 0.5) / len(drawn.rows)
        axes.text(-0.03, at, label, fontsize=8, ha="right", va="center", color="0.25", transform=axes.transAxes)
    numbers = drawn.numbers
    text = f"ℓ∞ {numbers['linf'] * 255:.0f}   ℓ2 {numbers['l2']:.2f}   SSIM {numbers['ssim']:.3f}"
    axes.text(0, -0.02, text, fontsize=8.5, va="top", transform=axes.transAxes)


def _tiled(rows: Sequence[Tensor]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows of images as one RGB picture with white gaps between them."""
    gap = max(1, rows[0].shape[3] // 16)
    lines = []
    for images in rows:
        coloured = images.detach().float().cpu().expand(-1, 3, -1, -1)
        blank = torch.full((SHOWN - len(coloured), *coloured.shape[1:]), PAPER)
        padded = torch.nn.functional.pad(torch.cat([coloured, blank]), (0, gap, 0, gap), value=PAPER)
        lines.append(torch.cat(list(padded), dim=2))
    picture: np.ndarray[Any, np.dtype[np.float32]] = torch.cat(lines, dim=1).permute(1, 2, 0).numpy()
    return picture
