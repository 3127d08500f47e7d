"""Devices, and weights to start from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from toys import small_model, weights_of

from fl_sim.build import component
from fl_sim.errors import ConfigError
from fl_sim.models.cnn import Cnn
from fl_sim.models.wide_resnet import WideResNet
from fl_sim.world import load_weights, pick_device


def test_the_cpu_is_always_there() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "cpu:1"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not on this machine; there are auto, cpu") as caught:
        pick_device(name)
    assert caught.value.key == "device"


def test_saved_weights_come_back_whole(tmp_path: Path) -> None:
    saved, model = small_model(0), small_model(1)
    saved.body[0][1].running_mean.fill_(3.0)
    saved.body[0][1].num_batches_tracked.fill_(7)
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    load_weights(str(tmp_path / "model.pt"), model)
    assert torch.equal(weights_of(model), weights_of(saved))
    assert int(model.body[0][1].num_batches_tracked) == 7


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    torch.save(small_model(architecture=Cnn(width=5)).state_dict(), tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    for name in ("other.pt", "list.pt", "garbage.pt", "none.pt"):
        with pytest.raises(ConfigError) as caught:
            load_weights(str(tmp_path / name), small_model())
        assert caught.value.key == "init"
        assert "\n" not in str(caught.value)


def test_what_differs_is_said_in_plain_words(tmp_path: Path) -> None:
    """The first tensor that differs, by its name, with both sizes or both counts; never torch's own long text.

    A CNN has 20 tensors: in each of three stages a convolution and batch normalisation's five, and the head's two.
    """
    model, states = small_model(), {}
    states["wider"] = small_model(architecture=Cnn(width=5)).state_dict()
    states["classes"] = small_model(classes=7).state_dict()
    states["residual"] = small_model(architecture=WideResNet(10)).state_dict()
    states["surplus"] = {**model.state_dict(), "body.more": torch.zeros(1)}
    states["none"] = {}
    states["checkpoint"] = {"format": 1, "vector": torch.zeros(3), "names": ["a"]}
    states["whole"] = {"model": model.state_dict(), "epoch": 3}
    states["nan"] = {name: tensor / 0 for name, tensor in model.state_dict().items()}
    first = "body.0.0.weight"
    states["huge"] = {name: tensor.double() + 1e300 for name, tensor in model.state_dict().items()}
    states["sparse"] = {**model.state_dict(), first: model.state_dict()[first].to_sparse()}
    states["complex"] = {**model.state_dict(), first: model.state_dict()[first] + 1j}
    for name, state in states.items():
        torch.save(state, tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pickled")
    (tmp_path / "text").write_text("root:x:0:0\n")
    (tmp_path / "folder").mkdir()
    expected = {
        "wider": "the first tensor that differs is body.0.0.weight: 5×1×3×3 there, 4×1×3×3 here",
        "classes": "the first tensor that differs is body.5.weight: 7×16 there, 4×16 here",
        "residual": "tensors, this run's model 20; the first that it lacks is body.0.0.weight",
        "surplus": "it holds 21 tensors, this run's model 20; the first that is unknown here is body.more",
        "none": "it holds 0 tensors, this run's model 20; the first that it lacks is body.0.0.weight",
        "checkpoint": "not a saved model but a run's checkpoint; its last model is in model.pt",
        "whole": "not a saved model: it holds no state_dict(), tensors by their names",
        "nan": "the saved model holds NaN or infinity",
        "huge": "the saved model holds NaN or infinity",
        "sparse": "not a saved model: it is damaged, no file of torch.save's, or holds more than tensors",
        "complex": "body.0.0.weight is no ordinary tensor of real numbers",
        "pipe": "not a saved model: no regular file",
        "pickled": "not a saved model: it is damaged, no file of torch.save's, or holds more than tensors",
        "text": "not a saved model: it is damaged, no file of torch.save's, or holds more than tensors",
        "folder": "can't be read: Is a directory",
    }
    before = weights_of(model)
    for name, reason in expected.items():
        with pytest.raises(ConfigError) as caught:
            load_weights(str(tmp_path / name), model)
        assert str(caught.value).endswith(reason), name
        assert "\n" not in str(caught.value)
    assert torch.equal(weights_of(model), before)


def test_what_a_configuration_names_is_looked_at_before_it_is_called(tmp_path: Path) -> None:
    """A configuration may be somebody else's: a function, or a class that is no such component, is never called."""
    for target, arguments in (("os.mkdir", {"path": str(tmp_path / "made")}), ("subprocess.Popen", {"args": "true"})):
        with pytest.raises(ConfigError, match=r"is no tracker: no class that has log\(\)"):
            component("tracker", {"_target_": target, **arguments})
    assert not (tmp_path / "made").exists()
