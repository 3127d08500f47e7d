"""What torchvision's data sets have in common: fetching, reading, checking, caching."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fl_sim.data.cache import cached, files_under
from fl_sim.data.dataset import Dataset, Facts, check_common, kept, resized, thinned
from fl_sim.errors import ConfigError, require
from fl_sim.samples import Samples

IDX_PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
"""The four files of MNIST and of what copies its format."""
ABSENT = "is absent; data.download=true fetches it"


@dataclass(frozen=True)
class Published:
    """What is known of one of torchvision's data sets before its files are read."""

    title: str
    kind: str
    """The class in `torchvision.datasets`."""
    folder: str
    """What `root` must hold."""
    classes: int
    train_samples: int
    test_samples: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: tuple[str, ...] = ()
    """Its files under `root`, where torchvision doesn't list them with their checksums."""
    train: Mapping[str, Any] | None = None
    test: Mapping[str, Any] | None = None
    """What torchvision's class is asked for, if not `train=True` and `train=False`."""

    def check(self, clean_fraction: float, image_size: int, subset: float) -> None:
        fewest = min(self.train_samples, self.test_samples)
        check_common(clean_fraction, image_size, subset, fewest, self.classes)

    def facts(self, image_size: int, subset: float) -> Facts:
        shape = (len(self.mean), image_size, image_size)
        return Facts(shape, self.classes, kept(self.train_samples, subset), self.mean, self.std)


def as_arrays(raw: Any, size: int) -> Samples:
    """A set that torchvision holds in memory: [N, H, W, C] or, grey, [N, H, W]."""
    images = torch.as_tensor(raw.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return Samples(resized(images.contiguous(), size), torch.as_tensor(raw.targets, dtype=torch.long))


def load_published(
    published: Published,
    root: str,
    *,
    image_size: int,
    subset: float,
    download: bool,
    decode: Callable[[Any, int], Samples] = as_arrays,
) -> Dataset:
    """Read a set by torchvision, fetching it if that is allowed, or read what an earlier start has decoded."""
    folder = Path(root).expanduser()

    def part(name: str, options: Mapping[str, Any], count: int) -> Samples:
        samples = decode(_opened(published, folder, options, download), image_size)
        allowed = f"{published.folder} there holds {len(samples)} {name} images, but {published.title} has {count}"
        require(len(samples) == count, "root", root, allowed)
        return samples

    def read() -> Dataset:
        train = part("training", published.train or {"train": True}, published.train_samples)
        return Dataset(train, part("test", published.test or {"train": False}, published.test_samples))

    name = f"{published.title.lower().replace(' ', '_')}-{image_size}"
    return thinned(cached(folder, name, lambda: files_under(folder / published.folder), read), subset)


def _opened(published: Published, root: Path, options: Mapping[str, Any], download: bool) -> Any:
    from torchvision import datasets  # imported late: it takes a second

    kind, fresh = getattr(datasets, published.kind), not root.exists()
    try:
        return kind(str(root), download=download, **options)
    except MemoryError:
        raise
    except Exception as error:  # damaged files make torchvision raise nearly anything
        complaint = _complaint(published, kind, root, download, error)
        for folder in [*sorted(root.rglob("*/"), reverse=True), root] if fresh else ():
            with suppress(OSError):  # those that torchvision made and could fetch nothing into are empty
                folder.rmdir()
        raise ConfigError("root", str(root), complaint) from error


def _complaint(published: Published, kind: Any, root: Path, download: bool, error: Exception) -> str:
    """Which file is at fault, and what can be done."""
    title, there = published.title, os.path.isdir(root / published.folder)
    for file, md5 in _expected(published, kind).items() if there else ():
        fault = _fault(root / file, md5)
        if fault is not None and not (fault == ABSENT and download):
            return f"{file} {fault}"
    if download:
        return f"{title} is not all there, and fetching it failed: {_line(error)}"
    if there:
        return f"{published.folder} there can't be read as {title} ({_line(error)})"
    return f"no {title} there (no folder {published.folder}); give its folder, or data.download=true to fetch it"


def _expected(published: Published, kind: Any) -> dict[str, str | None]:
    """The files that a set consists of, with their checksums where torchvision knows those."""
    listed = [*getattr(kind, "train_list", ()), *getattr(kind, "test_list", ())]
    if listed:
        listed.append((kind.meta["filename"], kind.meta["md5"]))
    return {**{f"{published.folder}/{name}": md5 for name, md5 in listed}, **dict.fromkeys(published.files)}


def _fault(path: Path, md5: str | None) -> str | None:
    """What is wrong with a file, if anything is."""
    from torchvision.datasets.utils import check_integrity

    if not os.path.isfile(path):
        return ABSENT
    try:
        whole = _whole_idx(path) if md5 is None else check_integrity(path, md5)
    except OSError as error:
        return f"can't be read ({error.strerror})"
    reason = "its length is not what its header says" if md5 is None else "its md5 is not the published one"
    return None if whole else f"is corrupt ({reason}); remove it, then data.download=true fetches it anew"


def _whole_idx(path: Path) -> bool:
    """Whether a file in MNIST's format has the length that its header claims: bytes in up to three dimensions."""
    with path.open("rb") as file:
        header = file.read(16)
    dimensions = header[3] if len(header) > 3 else 0
    if header[:3] != b"\0\0\x08" or dimensions not in (1, 3) or len(header) < 4 + 4 * dimensions:
        return False
    length = 1
    for at in range(dimensions):
        length *= int.from_bytes(header[4 + 4 * at : 8 + 4 * at], "big")
    return path.stat().st_size == 4 + 4 * dimensions + length


def _line(error: Exception) -> str:
    """An error's text as one line."""
    return " ".join(str(error).split()) or type(error).__name__
