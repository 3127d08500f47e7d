"""Devices, and weights to start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import small_model, weights_of

from fl_sim.errors import ConfigError
from fl_sim.models.cnn import Cnn
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
