"""torchvision's data sets: read from tiny files in torchvision's own layouts, and compared with its own reading."""

from __future__ import annotations

import hashlib
import os
import pickle
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from fl_sim import execution
from fl_sim.composing import compose_config
from fl_sim.data import cifar10, cifar100, emnist, fashion_mnist, gtsrb, mnist
from fl_sim.data.cache import FOLDER
from fl_sim.data.dataset import Dataset, resized
from fl_sim.errors import ConfigError
from fl_sim.samples import Samples

Arrays = tuple[np.ndarray[Any, Any], list[int]]


def drawn(count: int, classes: int, shape: tuple[int, ...], seed: int) -> Arrays:
    """Random images, with labels that are not sorted and name each class."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.permutation(np.arange(count) % classes).tolist()


def write_cifar(root: Path, kind: type, patch: pytest.MonkeyPatch, train: Arrays, test: Arrays, key: str) -> None:
    """Pickled batches; torchvision's checksums become those of the files written."""
    folder = root / kind.base_folder  # type: ignore[attr-defined]
    folder.mkdir(parents=True)

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    names = [name for name, _ in kind.train_list]  # type: ignore[attr-defined]
    pieces = zip(names, np.array_split(np.arange(len(train[1])), len(names)), strict=True)
    batch = {name: {"data": train[0][at].reshape(len(at), -1), key: [train[1][i] for i in at]} for name, at in pieces}
    patch.setattr(kind, "train_list", [write(name, content) for name, content in batch.items()])
    [[name, _]] = kind.test_list  # type: ignore[attr-defined]
    patch.setattr(kind, "test_list", [write(name, {"data": test[0].reshape(len(test[1]), -1), key: test[1]})])
    meta = dict(kind.meta)  # type: ignore[attr-defined]
    _, meta["md5"] = write(meta["filename"], {meta["key"]: ["a"]})
    patch.setattr(kind, "meta", meta)


def idx(array: np.ndarray[Any, Any]) -> bytes:
    """MNIST's format: a magic number with the type (8: bytes) and the dimensions, their lengths, the bytes."""
    lengths = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes([0, 0, 8, array.ndim]) + lengths + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, prefixes: tuple[str, str], train: Arrays, test: Arrays) -> None:
    folder.mkdir(parents=True)
    for prefix, (images, labels) in zip(prefixes, (train, test), strict=True):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.asarray(labels)))


def write_gtsrb(root: Path, train: Arrays, test: Arrays) -> None:
    """PPM files of several sizes: class folders for training, a table of labels for the test."""
    base = root / "gtsrb"
    for part, (images, labels) in (("Training", train), ("Final_Test/Images", test)):
        for at, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = base / "GTSRB" / part / (f"{label:05d}" if part == "Training" else "")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[: 20 + at % 13, : 17 + at % 16]).save(folder / f"{at:05d}.ppm")
    rows = [f"{at:05d}.ppm;{label}" for at, label in enumerate(test[1])]
    (base / "GT-final_test.csv").write_text("\n".join(["Filename;ClassId", *rows]))


@dataclass(frozen=True)
class Case:
    """A set of tiny files, the spec that reads them, and torchvision's class for them."""

    root: Path
    module: ModuleType
    spec: Callable[..., Any]
    theirs: Callable[[bool], Any]
    first_label: int = 0

    def load(self, **keys: Any) -> Dataset:
        loaded: Dataset = self.spec(root=str(self.root), **keys).load()
        return loaded


NAMES = ("cifar10", "cifar100", "mnist", "fashion_mnist", "emnist", "emnist_letters", "gtsrb")


def fabricate(name: str, root: Path, patch: pytest.MonkeyPatch) -> Case:
    """The named set with 7 training images more than classes, and a test image for each class."""
    classes = {"cifar100": 100, "emnist": 47, "emnist_letters": 26, "gtsrb": 43}.get(name, 10)
    colour = name in ("cifar10", "cifar100", "gtsrb")
    shape = {"gtsrb": (32, 32, 3)}.get(name, (3, 32, 32) if colour else (28, 28))
    train, test = drawn(classes + 7, classes, shape, 1), drawn(classes, classes, shape, 2)
    spec: Callable[..., Any]
    if name in ("cifar10", "cifar100"):
        kind: Any = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        write_cifar(root, kind, patch, train, test, "labels" if name == "cifar10" else "fine_labels")
        module, spec = (cifar10, cifar10.Cifar10) if name == "cifar10" else (cifar100, cifar100.Cifar100)
    elif name in ("mnist", "fashion_mnist"):
        kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[name]
        write_idx(root / kind.__name__ / "raw", ("train", "t10k"), train, test)
        module, spec = (mnist, mnist.Mnist) if name == "mnist" else (fashion_mnist, fashion_mnist.FashionMnist)
    elif name == "gtsrb":
        write_gtsrb(root, train, test)
        module, spec = gtsrb, gtsrb.Gtsrb
    else:
        split = "letters" if name == "emnist_letters" else "balanced"
        if split == "letters":  # whose files number their classes from 1
            train, test = (train[0], [y + 1 for y in train[1]]), (test[0], [y + 1 for y in test[1]])
        write_idx(root / "EMNIST" / "raw", (f"emnist-{split}-train", f"emnist-{split}-test"), train, test)
        small = replace(emnist.PUBLISHED[split], train_samples=classes + 7, test_samples=classes)
        patch.setitem(emnist.PUBLISHED, split, small)  # type: ignore[arg-type]

        def spec(**keys: Any) -> emnist.Emnist:
            return emnist.Emnist(split=split, **keys)  # type: ignore[arg-type]

        return Case(root, emnist, spec, lambda part: datasets.EMNIST(str(root), split, train=part), split == "letters")
    patch.setattr(module, "PUBLISHED", replace(module.PUBLISHED, train_samples=classes + 7, test_samples=classes))
    if name == "gtsrb":
        return Case(root, module, spec, lambda part: datasets.GTSRB(str(root), "train" if part else "test"))
    return Case(root, module, spec, lambda part: kind(str(root), train=part))


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    return fabricate(request.param, tmp_path, monkeypatch)


def as_theirs(case: Case, train: bool, size: int) -> tuple[Tensor, list[int]]:
    """torchvision's own reading, one image after another; GTSRB's resized by Pillow, EMNIST's turned upright."""
    pictures, labels = zip(*(case.theirs(train)[at] for at in range(len(case.theirs(train)))), strict=True)
    if case.module is gtsrb:
        pictures = tuple(picture.resize((size, size), Image.Resampling.BILINEAR) for picture in pictures)
    arrays = [np.asarray(picture) for picture in pictures]
    if case.module is emnist:
        arrays = [array.T for array in arrays]
    images = torch.stack([torch.tensor(array).view(*array.shape[:2], -1).permute(2, 0, 1) for array in arrays])
    return images, [label - case.first_label for label in labels]


def same(a: Dataset, b: Dataset) -> bool:
    return all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels)
        for x, y in ((a.train, b.train), (a.test, b.test))
    )


# Reading --------------------------------------------------------------------------------------------------------------


def test_a_set_is_read_as_torchvision_reads_it(case: Case) -> None:
    """Pixel by pixel and label by label, against torchvision's `dataset[i]`; the facts are the data's."""
    spec = case.spec(root=str(case.root))
    data, size = spec.load(), spec.image_size
    for part, train in ((data.train, True), (data.test, False)):
        images, labels = as_theirs(case, train, size)
        assert part.images.dtype == torch.uint8
        assert torch.equal(part.images, images)
        assert part.labels.tolist() == labels
        assert tuple(part.images.shape[1:]) == spec.facts.shape
        assert sorted(set(labels)) == list(range(spec.facts.classes))
    assert len(data.train) == spec.facts.train_samples == spec.facts.classes + 7


def test_another_size(case: Case) -> None:
    """Sets of one size are resized as all tensors are; GTSRB's files of many sizes directly, by Pillow."""
    data = case.load(image_size=16)
    whole = torch.cat([as_theirs(case, train, 16 if case.module is gtsrb else 0)[0] for train in (True, False)])
    ours = torch.cat([data.train.images, data.test.images])
    assert ours.shape[2:] == (16, 16)
    if case.module is emnist:  # resizing and turning upright commute but for the order of floating-point sums
        assert (ours.int() - resized(whole, 16).int()).abs().max() <= 1
    else:
        assert torch.equal(ours, resized(whole, 16))


def test_a_subset_is_a_stratified_share_of_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.9 of MNIST's small copy: round(15.3) = 15 and 9 images, the same every time, and the facts say so."""
    case = fabricate("mnist", tmp_path, monkeypatch)
    monkeypatch.setattr(mnist, "PUBLISHED", replace(mnist.PUBLISHED, classes=9))
    part, whole = case.load(subset=0.9), case.load()
    assert (len(part.train), len(part.test)) == (15, 9)
    assert mnist.Mnist(subset=0.9).facts.train_samples == 15
    assert same(part, case.load(subset=0.9))
    everything = [tuple(image.flatten().tolist()) for image in whole.train.images]
    assert all(tuple(image.flatten().tolist()) in everything for image in part.train.images)


def test_published_facts() -> None:
    """Counts of the data sets' papers and pages; byclass has 814,255 images in all, balanced 131,600."""
    facts = emnist.PUBLISHED
    assert facts["byclass"].train_samples + facts["byclass"].test_samples == 814_255
    assert facts["bymerge"].train_samples + facts["bymerge"].test_samples == 814_255
    assert facts["balanced"].train_samples + facts["balanced"].test_samples == 131_600
    assert facts["letters"].train_samples + facts["letters"].test_samples == 145_600
    assert facts["digits"].train_samples + facts["digits"].test_samples == 280_000
    for split, each in facts.items():  # torchvision counts a class "N/A" among the letters
        assert each.classes == len(datasets.EMNIST.classes_split_dict[split]) - (split == "letters")
    assert set(facts) == set(datasets.EMNIST.splits)
    assert cifar100.Cifar100().facts.classes == 100
    assert (gtsrb.Gtsrb().facts.classes, gtsrb.Gtsrb(subset=0.1).facts.train_samples) == (43, 2664)


@pytest.mark.parametrize("subset", [0.0, -0.5, 1.5, 0.0005])
def test_an_impossible_subset_is_refused(subset: float) -> None:
    """0.0005 of the 10,000 test images are 5, fewer than the ten classes."""
    with pytest.raises(ConfigError) as caught:
        mnist.Mnist(subset=subset)
    assert caught.value.key == "subset"


# The cache ------------------------------------------------------------------------------------------------------------


def forbid_reading(patch: pytest.MonkeyPatch) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("the files are read again")

    patch.setattr("fl_sim.data.torchvision_sets._opened", opened)


def test_the_second_start_reads_the_cache(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples without opening the set again; each size is kept for itself."""
    first, small = case.load(), case.load(image_size=8)
    forbid_reading(monkeypatch)
    assert same(case.load(), first)
    assert same(case.load(image_size=8), small)
    with pytest.raises(AssertionError):
        case.load(image_size=9)


def test_changed_files_are_read_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is as long as before but younger may hold anything."""
    case.load()
    file = next(path for path in sorted(case.root.rglob("*")) if path.is_file() and FOLDER not in path.parts)
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
    forbid_reading(monkeypatch)
    with pytest.raises(AssertionError):
        case.load()


@pytest.mark.parametrize("damage", ["flipped", "cut", "foreign", "empty", "other format"])
def test_a_damaged_cache_is_made_anew(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quietly, with the same samples; a flipped byte among the pixels is found by its checksum."""
    case = fabricate("mnist", tmp_path, monkeypatch)
    first = case.load()
    [path] = (tmp_path / FOLDER).iterdir()
    content = path.read_bytes()
    at = content.index(first.train.images[3].numpy().tobytes())
    flipped = content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]
    path.write_bytes({"flipped": flipped, "cut": content[:at], "foreign": b"x" * 99}.get(damage, b""))
    if damage == "other format":
        torch.save({"mark": 3}, path)
    assert same(case.load(), first)
    assert path.read_bytes() == content
    forbid_reading(monkeypatch)
    assert same(case.load(), first)


def test_a_root_that_cannot_be_written_works_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file stands where the cache's folder would be, so that not even root can make it."""
    case = fabricate("cifar10", tmp_path, monkeypatch)
    (tmp_path / FOLDER).write_text("in the way")
    assert same(case.load(), case.load())
    assert (tmp_path / FOLDER).read_text() == "in the way"


# What can be wrong ----------------------------------------------------------------------------------------------------


def complaint(case: Case, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        case.load(**keys)
    assert caught.value.key == "root"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """No network: what is asked for is written down, and refused as a machine without a name server does."""
    asked: list[object] = []

    def refuse(request: object, *_: object, **__: object) -> None:
        asked.append(request)
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


@pytest.mark.parametrize("name", NAMES)
def test_absent_and_offline_is_one_clear_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: list[object]
) -> None:
    """Without `download` nothing is asked of the network or written; with it the line says why it failed."""
    case = replace(fabricate(name, tmp_path / "made", monkeypatch), root=tmp_path / "none")
    assert "data.download=true" in complaint(case)
    assert not (tmp_path / "none").exists()
    assert offline == []
    assert "name resolution" in complaint(case, download=True)
    assert offline != []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "emnist_letters"])
def test_a_run_without_its_data_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    """The choice composes and builds, and the complaint names the key as the command line does."""
    with pytest.raises(ConfigError, match=r"data\.download=true") as caught:
        execution.prepare(compose_config([f"data={name}", f"data.root={tmp_path}"]))
    assert caught.value.key == "data.root"
    assert list(tmp_path.iterdir()) == []


def test_what_is_fetched_is_read_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's download runs when it is allowed; the second start then reads the cache."""
    case = fabricate("mnist", tmp_path / "made", monkeypatch)
    absent, fetched = replace(case, root=tmp_path / "new"), []

    def fetch(url: str, download_root: str, filename: str, md5: str) -> None:
        fetched.append(url)
        name = filename.removesuffix(".gz")
        (Path(download_root) / name).write_bytes((case.root / "MNIST" / "raw" / name).read_bytes())

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fetch)
    first = absent.load(download=True)
    assert len(fetched) == 4
    assert same(first, case.load())
    forbid_reading(monkeypatch)
    assert same(absent.load(download=True), first)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        ("cifar10", "cifar-10-batches-py/batches.meta"),
        ("cifar100", "cifar-100-python/test"),
        ("mnist", "MNIST/raw/t10k-images-idx3-ubyte"),
        ("fashion_mnist", "FashionMNIST/raw/train-labels-idx1-ubyte"),
        ("emnist", "EMNIST/raw/emnist-balanced-train-images-idx3-ubyte"),
        ("gtsrb", "gtsrb/GTSRB/Training/00007/00003.ppm"),
    ],
)
def test_a_damaged_or_absent_file_is_named(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: list[object]
) -> None:
    """A file that lost its end, then the same file gone; a set that was cached before does not hide either."""
    case = fabricate(name, tmp_path, monkeypatch)
    case.load()
    path = tmp_path / file
    if name == "gtsrb":
        path = next(iter(sorted(path.parent.iterdir())))
    path.write_bytes(path.read_bytes()[:-5])
    found = complaint(case)
    assert path.relative_to(tmp_path).as_posix() in found
    assert "is corrupt" in found or name == "gtsrb"
    path.unlink()
    if name == "gtsrb" and not any(path.parent.iterdir()):
        path.parent.rmdir()
    absent = "49 training images, but GTSRB has 50" if name == "gtsrb" else f"{file} is absent"
    assert absent in complaint(case)
    assert offline == []


def test_a_set_that_is_smaller_than_published_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST's files have no checksum once unpacked; their counts must at least be right."""
    case = fabricate("mnist", tmp_path, monkeypatch)
    monkeypatch.undo()
    assert "holds 17 training images, but MNIST has 60000" in complaint(case)


# The real thing -------------------------------------------------------------------------------------------------------


def in_bytes(part: Samples) -> int:
    return part.images.nbytes + part.labels.nbytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "folder", "per_class", "mean", "std"),
    [
        (cifar10.Cifar10, "cifar-10-batches-py", (5000, 1000), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        (fashion_mnist.FashionMnist, "FashionMNIST", (6000, 1000), (0.2860,), (0.3530,)),
    ],
)
def test_the_real_sets_have_the_published_counts_and_means(
    spec: Callable[..., Any],
    folder: str,
    per_class: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    tmp_path: Path,
) -> None:
    """With FL_SIM_DATA naming a root that holds them. CIFAR-10 is 60,000 × 3,072 bytes and labels: below 400 MB."""
    source = Path(os.environ.get("FL_SIM_DATA", "/nowhere")) / folder
    if not source.is_dir():
        pytest.skip(f"FL_SIM_DATA names no folder that holds {folder}")
    (tmp_path / folder).symlink_to(source.resolve())
    data = spec(root=str(tmp_path)).load()
    assert data.train.labels.bincount().tolist() == [per_class[0]] * 10
    assert data.test.labels.bincount().tolist() == [per_class[1]] * 10
    pixels = data.train.images.transpose(0, 1).flatten(1).double() / 255
    assert pixels.mean(1).tolist() == pytest.approx(mean, abs=5e-5)
    assert pixels.std(1).tolist() == pytest.approx(std, abs=5e-5)
    assert in_bytes(data.train) + in_bytes(data.test) < 400e6
    assert same(spec(root=str(tmp_path)).load(), data)
