"""Folders of images: read as torchvision's `ImageFolder` reads them, and refused in one line where they can't be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from fl_sim import execution
from fl_sim.composing import compose_config
from fl_sim.data.image_folder import ImageFolder
from fl_sim.data.pictures import decoded
from fl_sim.errors import ConfigError

MODES = ("RGB", "L", "RGBA", "P", "1", "CMYK")


def write(path: Path, seed: int, mode: str = "RGB") -> None:
    """A random picture of 12 to 30 pixels a side."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*rng.integers(12, 31, 2), 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of 4, 5 and 6 training and 2 test pictures each, in several formats, some in subfolders."""
    for number, name in enumerate(("bee", "ant", "Cat")):
        for at in range(4 + number):
            ending, mode = ("png", MODES[at % 5]) if at % 2 else ("JPG", "RGB")
            write(tmp_path / "train" / name / ("more" if at == 3 else "") / f"{at}.{ending}", 10 * number + at, mode)
        for at in range(2):
            write(tmp_path / "test" / name / f"{at}.bmp", 100 + 10 * number + at)
        (tmp_path / "train" / name / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_folder_is_read_as_torchvision_reads_it(root: Path, part: str) -> None:
    """Same order, labels and pixels as ImageFolder with Resize and CenterCrop."""
    spec = ImageFolder(root=str(root), image_size=10)
    ours = getattr(spec.load(), part)
    fit = transforms.Compose([transforms.Resize(10), transforms.CenterCrop(10)])
    theirs = datasets.ImageFolder(str(root / part), transform=fit)
    assert ours.labels.tolist() == theirs.targets
    for image, (picture, _) in zip(ours.images, theirs, strict=True):
        assert torch.equal(image.permute(1, 2, 0), torch.tensor(np.asarray(picture)))


def test_the_facts_are_known_before_loading(root: Path) -> None:
    """15 training pictures of 3 classes; one number stands for all channels; half of 15 is 8 by round(7.5)."""
    facts = ImageFolder(root=str(root), image_size=10, mean=(0.4,), std=(0.2, 0.3, 0.4)).facts
    assert (facts.shape, facts.classes, facts.train_samples) == ((3, 10, 10), 3, 15)
    assert (facts.mean, facts.std) == ((0.4, 0.4, 0.4), (0.2, 0.3, 0.4))
    half = ImageFolder(root=str(root), subset=0.5)
    data = half.load()
    assert half.facts.train_samples == len(data.train) == 8
    assert data.test.labels.bincount().tolist() == [1, 1, 1]


def test_grey(root: Path) -> None:
    """One channel: Pillow's luminance of each picture, before it is resized."""
    spec = ImageFolder(root=str(root), image_size=8, channels=1)
    data = spec.load()
    assert spec.facts.shape == tuple(data.test.images.shape[1:]) == (1, 8, 8)
    with Image.open(root / "test" / "Cat" / "0.bmp") as file:
        picture = transforms.CenterCrop(8)(transforms.Resize(8)(file.convert("L")))
    assert torch.equal(data.test.images[0, 0], torch.tensor(np.asarray(picture)))


@pytest.mark.parametrize(("height", "width"), [(16, 32), (32, 16)])
def test_a_long_picture_loses_its_ends(tmp_path: Path, height: int, width: int) -> None:
    """16×32 at 8 pixels: halved to 8×16, of which the middle 8 stay; the black quarters at both ends are gone."""
    pixels = np.full((16, 32, 3), 200, dtype=np.uint8)
    pixels[:, :7] = pixels[:, 25:] = 0
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(pixels if height == 16 else pixels.transpose(1, 0, 2)).save(
                tmp_path / part / name / "0.png"
            )
    data = ImageFolder(root=str(tmp_path), image_size=8).load()
    assert data.train.images.shape == (2, 3, 8, 8)
    assert data.test.images.unique().tolist() == [200]


def test_a_class_that_the_test_part_lacks_keeps_the_others_labels(root: Path) -> None:
    """Sorted, the classes are Cat, ant, bee; without ant's folder bee must stay 2, where torchvision would say 1."""
    for path in (root / "test" / "ant").iterdir():
        path.unlink()
    (root / "test" / "ant").rmdir()
    assert ImageFolder(root=str(root)).load().test.labels.tolist() == [0, 0, 2, 2]


def test_the_second_start_reads_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture is decoded again until a file is added."""
    first = ImageFolder(root=str(root)).load()

    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("the pictures are decoded again")

    with monkeypatch.context() as patch:
        patch.setattr("fl_sim.data.image_folder.decoded", decoded)
        again = ImageFolder(root=str(root), augment=ImageFolder.augment).load()
        assert torch.equal(again.train.images, first.train.images)
        assert torch.equal(again.test.labels, first.test.labels)
        for keys in ({"channels": 1}, {"image_size": 32}):
            with pytest.raises(AssertionError):
                ImageFolder(root=str(root), **keys).load()  # type: ignore[arg-type]
    write(root / "train" / "ant" / "new.png", 7)
    assert len(ImageFolder(root=str(root)).load().train) == 16


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def without(*names: str) -> Any:
    return lambda root: [remove(root / name) for name in names]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without("test"), "train/CLASS/... and test/CLASS/... (or val)"),
        (without("train"), "train/CLASS/... and test/CLASS/... (or val)"),
        (without("train/ant", "train/bee"), "has 1 classes"),
        (lambda root: (root / "train" / "dog").mkdir(), "train/dog there holds no images"),
        (lambda root: (root / "test" / "dog").mkdir(), "test/dog there is no class of train"),
        (without("test/ant", "test/bee", "test/Cat"), "test there holds no images"),
        (lambda root: (root / "train" / "bee" / "0.JPG").write_bytes(b"no picture"), "train/bee/0.JPG can't be read"),
        (lambda root: (root / "test" / "bee" / "1.bmp").write_bytes(b""), "test/bee/1.bmp can't be read"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(root: Path, spoil: Any, said: str) -> None:
    """One line that names the key and the file or folder; what its names show is found without opening a file."""
    spoil(root)
    with pytest.raises(ConfigError) as caught:
        ImageFolder(root=str(root)).load()
    assert caught.value.key == "root"
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_picture_is_named(root: Path) -> None:
    """Its header is whole, so only decoding finds it."""
    path = root / "train" / "ant" / "0.JPG"
    path.write_bytes(path.read_bytes()[:-80])
    spec = ImageFolder(root=str(root))
    with pytest.raises(ConfigError, match=r"train/ant/0\.JPG can't be read"):
        spec.load()


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"channels": 4}, "channels"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"mean": (2.0,)}, "mean"),
        ({"std": (0.0,)}, "std"),
        ({"std": ()}, "std"),
        ({"subset": 0.1}, "subset"),  # 2 pictures of 3 classes
        ({"image_size": 300}, "image_size"),
        ({"root": "/nowhere"}, "root"),
    ],
)
def test_impossible_settings_are_refused(root: Path, keys: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ImageFolder(**({"root": str(root)} | keys))
    assert caught.value.key == key


def test_a_configuration_can_name_a_folder(root: Path) -> None:
    """Three classes reach the model, half of the 15 pictures the clean set (8 by round(7.5)), 7 the two clients."""
    words = ["data=image_folder", "data.image_size=8", "data.clean_fraction=0.5", "data.mean=[0.4,0.5,0.6]"]
    words += ["clients=2", "clients_per_round=2", "partition=iid", "sampler=uniform"]
    world = execution.prepare(compose_config([*words, f"data.root={root}"]))
    assert world.initial_model()(torch.rand(2, 3, 8, 8)).shape == (2, 3)
    assert world.clean is not None
    assert (len(world.clean), sorted(map(len, world.shares))) == (8, [3, 4])
    with pytest.raises(ConfigError, match="val") as caught:
        execution.prepare(compose_config([*words, "data.root=/nowhere"]))
    assert caught.value.key == "data.root"


def test_pictures_of_sixteen_bits_are_refused_not_bleached(tmp_path: Path) -> None:
    """Pillow clips them at 255, so nearly every pixel would come out white, without a word."""
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(path)
    with pytest.raises(ConfigError, match="not 8 bits each"):
        decoded([(path, 0)], str(tmp_path), size=8, channels=1, fit="stretch")
