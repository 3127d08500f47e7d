"""Partitions as pictures: clients × classes, and how many samples each client has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_sim.checkpoint import write_atomically
from fl_sim.protocols import Indices
from fl_sim.schema import META
from fl_sim.world import World

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

PICTURE = "partition.png"
MOST = 1000
"""More columns than this would be thinner than a pixel."""
# As in the curves: distinct for colour-blind readers and in grey (Okabe & Ito 2008).
HONEST, MALICIOUS = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Counts:
    """How many samples of each class each client has [clients, classes], and who is malicious."""

    table: Indices
    malicious: frozenset[int] = frozenset()

    @classmethod
    def of(cls, world: World) -> Counts:
        labels, classes = world.train.labels.cpu().numpy(), world.parts.data.facts.classes
        threatened = world.parts.attack is not None or world.parts.collusion is not None
        return cls(count(world.shares, labels, classes), world.malicious if threatened else frozenset())


def count(shares: Sequence[Indices], labels: Indices, classes: int) -> Indices:
    """The samples of each class in each share: [shares, classes]."""
    return np.array([np.bincount(labels[share], minlength=classes) for share in shares])


def title(config: Mapping[str, Any]) -> str:
    """The name of a configuration's partition, and its settings."""
    settings = [f"{key} {value}" for key, value in config["partition"].items() if key not in (*META, "_target_")]
    return " · ".join([str(config["choices"]["partition"]), *settings])


def draw_partitions(partitions: Mapping[str, Counts], path: Path) -> None:
    """One picture of all the partitions, each under its title, one below the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported late: it takes half a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2 * len(partitions)))
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(partitions), 1, squeeze=False)[:, 0]
    for part, (title, counts) in zip(parts, partitions.items(), strict=True):
        _draw(part, title, counts)
    picture = BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_atomically(path, lambda file: file.write(picture.getvalue()))


def _draw(figure: SubFigure, title: str, counts: Counts) -> None:
    """Above, bars of each client's samples; below, a cell for each client and class, darker for more samples."""
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    clients, classes = counts.table.shape
    table = counts.table[:MOST]
    bad = np.isin(np.arange(len(table)), sorted(counts.malicious))
    margins = {"left": 0.08, "right": 0.93, "bottom": 0.12, "top": 0.91, "hspace": 0.12, "wspace": 0.03}
    (above, corner), (below, scale) = figure.subplots(
        2, 2, sharex="col", height_ratios=[1, 3], width_ratios=[60, 1], gridspec_kw=margins
    )
    corner.set_axis_off()
    edges = np.arange(len(table) + 1) - 0.5
    sizes = table.sum(1)
    for colour, who, label in ((HONEST, ~bad, "honest"), (MALICIOUS, bad, "malicious")):
        if who.any():
            above.stairs(np.where(who, sizes, 0), edges, fill=True, color=colour, label=f"{label} client")
    if bad.any():
        above.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8)
    above.set_ylabel("samples")
    above.set_ylim(bottom=0)
    above.spines[["top", "right"]].set_visible(False)
    # A square root between count and colour: few samples must not look like none beside a client that has many.
    shade = PowerNorm(0.5, vmin=0, vmax=max(int(table.max()), 1))
    image = below.imshow(table.T, cmap="Greys", norm=shade, aspect="auto", interpolation="nearest", origin="lower")
    below.set_ylabel("class")
    below.set_xlabel("client" if clients <= MOST else f"client (the first {MOST:,} of {clients:,})")
    for axis in (below.xaxis, below.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    if len(table) <= 50:  # wide enough for lines between the cells
        below.vlines(edges, -0.5, classes - 0.5, color="0.85", linewidth=0.6)
        below.hlines(np.arange(classes + 1) - 0.5, -0.5, len(table) - 0.5, color="0.85", linewidth=0.6)
    figure.colorbar(image, cax=scale, label="samples")
    above.set_title(title, fontsize=10, loc="left")
