"""Decoded data sets, kept beside their files so that the next start need not decode them again."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from fl_sim.checkpoint import load_tensors, save_tensors
from fl_sim.data.dataset import Dataset
from fl_sim.errors import RunError
from fl_sim.samples import Samples

FOLDER = ".fl_sim_cache"
FORMAT = 1


def cached(root: Path, name: str, files: Callable[[], Iterable[str]], decode: Callable[[], Dataset]) -> Dataset:
    """What `decode` makes of `files`: from the cache in `root` if they are unchanged since it was written there.

    `name` holds whatever else decides the content. A cache that can't be read is made anew; one that can't be
    written is done without.
    """
    path = root / FOLDER / f"{name}.pt"
    mark = fingerprint(root, files())
    found = _read(path, mark)
    if found is not None:
        return found
    decoded = decode()
    # The mark is of the files as they were before decoding, unless decoding has just fetched them.
    _write(path, mark or fingerprint(root, files()), decoded)
    return decoded


def files_under(folder: Path) -> list[str]:
    """All files of a folder and its subfolders; none if there is no such folder."""
    return [os.path.join(top, name) for top, _, names in os.walk(folder, followlinks=True) for name in names]


def fingerprint(root: Path, files: Iterable[str]) -> str:
    """Changes with any file's path, size or time of change; empty if there are none or one can't be looked at."""
    marks, base = [], str(root)
    try:
        for file in files:
            status = os.stat(file)
            marks.append(f"{file.removeprefix(base)}\0{status.st_size}\0{status.st_mtime_ns}\n")
    except OSError:
        return ""
    return hashlib.sha256(os.fsencode("".join(sorted(marks)))).hexdigest() if marks else ""


def _read(path: Path, mark: str) -> Dataset | None:
    if not mark:
        return None
    try:
        content = load_tensors(path)
        if (content["format"], content["mark"]) != (FORMAT, mark):
            return None
        tensors = content["tensors"]
        if _checksums(tensors) != content["checksums"]:
            return None
        train_images, train_labels, test_images, test_labels = tensors
        return Dataset(Samples(train_images, train_labels), Samples(test_images, test_labels))
    except (RunError, AttributeError, LookupError, TypeError, ValueError):
        return None


def _write(path: Path, mark: str, data: Dataset) -> None:
    tensors = [data.train.images, data.train.labels, data.test.images, data.test.labels]
    content = {"format": FORMAT, "mark": mark, "checksums": _checksums(tensors), "tensors": tensors}
    # A name of its own, because several runs of a sweep may decode the same files at the same time.
    own = path.with_name(f"{path.stem}.{os.getpid()}.pt")
    with suppress(OSError, RuntimeError):  # a folder that can't be written, a full disk: torch.save's own complaint
        path.parent.mkdir(exist_ok=True)
        save_tensors(own, content)
        os.replace(own, path)


def _checksums(tensors: list[Tensor]) -> list[int]:
    """torch.load doesn't look at the checksums in its file; these take 0.05 s for CIFAR-10."""
    return [zlib.crc32(tensor.numpy().data) for tensor in tensors]
