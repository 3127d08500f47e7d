"""Edge-case backdoor (Wang et al., NeurIPS 2020): rare images from the tail of the input distribution.

The paper poisons with images that hardly occur in the data: aeroplanes of one airline, old handwriting. With `folder`
those are images of your own: every second one (by name) is for training, the others are for the scorer, who shows them
in place of test images of the source class. Without it a stand-in: images of the source class in a rendering that is
rare, `quarter_turn` or `negative`. That stand-in is ours, a reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clients.triggers.drawing import by_content
from fl_sim.backdoor import Rule
from fl_sim.errors import ConfigError, require
from fl_sim.protocols import Workshop

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def pictures(folder: str) -> list[Path]:
    """The image files of a folder, by name."""
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in ENDINGS and path.is_file())


@lru_cache(maxsize=2)
def edge_images(folder: str, shape: tuple[int, int, int]) -> Tensor:
    """A folder's images as pixels [N, C, H, W] of the data set's shape."""
    from PIL import Image  # imported late: only those who have a folder need it
    from torchvision.transforms.functional import pil_to_tensor

    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    loaded = [Image.open(path).convert(mode).resize((width, height)) for path in pictures(folder)]
    return torch.stack([pil_to_tensor(image) for image in loaded]).float() / 255


@dataclass(frozen=True)
class EdgeCase:
    """Images of the source class as they hardly ever look, or a folder of such images, become the target."""

    uses_model: ClassVar[bool] = False
    rule: ClassVar[Rule] = "source_specific"
    folder: str | None = None
    stand_in: Literal["quarter_turn", "negative"] = "quarter_turn"

    def __post_init__(self) -> None:
        if self.folder is not None:
            require(Path(self.folder).is_dir(), "folder", self.folder, "no such folder")
            enough = len(pictures(self.folder)) >= 2
            require(enough, "folder", self.folder, f"must hold 2 or more images ({', '.join(ENDINGS)})")

    def check(self, shape: tuple[int, int, int]) -> None:
        turnable = self.folder is not None or self.stand_in != "quarter_turn" or shape[1] == shape[2]
        require(turnable, "stand_in", self.stand_in, "needs square images")
        if self.folder is not None:
            try:
                edge_images(self.folder, shape)
            except (OSError, ValueError) as error:  # Pillow's own error is an OSError
                raise ConfigError("folder", self.folder, f"holds what is no image ({error})") from error

    def rare(self, x: Tensor) -> Tensor:
        return x.rot90(1, (2, 3)) if self.stand_in == "quarter_turn" else 1 - x

    def _from_folder(self, x: Tensor, first: int) -> Tensor:
        assert self.folder is not None
        return edge_images(self.folder, (x.shape[1], x.shape[2], x.shape[3]))[first::2].to(x)

    def __call__(self, x: Tensor) -> Tensor:
        if self.folder is None:
            return self.rare(x)
        images = self._from_folder(x, 1)
        return images[by_content(x, len(images))]

    def craft(self, x: Tensor, y: Tensor, workshop: Workshop) -> Tensor:
        if self.folder is None:
            return self.rare(x)
        images = self._from_folder(x, 0)
        return images[torch.randint(len(images), (len(x),), generator=workshop.rng).to(x.device)]
