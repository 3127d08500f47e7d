"""Every eraser on every kind of network: it works, or it refuses in one line before it has done anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from toys import server_context, small_model, spotted, weights_of

from fl_sim.build import component
from fl_sim.composing import choices, conf_folder
from fl_sim.errors import ConfigError
from fl_sim.layout import Layout
from fl_sim.metrics import refusal
from fl_sim.models.classifier import Classifier

ERASERS = {name: path for name, path in choices("eraser", [conf_folder()]).items() if name != "none"}
NETWORKS = ("cnn", "resnet18", "preact_resnet18", "wrn_16_1", "vgg11_bn", "vit_tiny")
REFUSED = {(name, "vit_tiny") for name in ("anp", "bna", "clp", "linf", "rnp", "robust_kd")}
"""What needs convolutions, batch normalisation or a layer after each tap; everything else must work."""
MAY_DIVERGE = {("id3", "vgg11_bn")}
"""Its loss is relative to the teacher's features, and those of a fresh VGG are next to zero; the server refuses it."""
COVERED = {(eraser, ("cnn", "wrn_16_1")[index % 2]) for index, eraser in enumerate(ERASERS)} | REFUSED
"""What is not slow: each eraser on one of the two small networks."""


def shortened(name: str) -> dict[str, Any]:
    """A choice's own file with one epoch and two steps of everything that it counts."""
    section: Any = OmegaConf.to_container(OmegaConf.load(ERASERS[name]))
    return dict(_shortened(section))


def _shortened(section: Any) -> Any:
    at_most = {"epochs": 1, "rounds": 1, "steps": 2, "size": 8, "up": 2}
    for key, value in section.items():
        if isinstance(value, dict):
            _shortened(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            section[key] = min(value, at_most.get(key.rpartition("_")[2], value))
    return section


def network(name: str) -> Classifier:
    section: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "model" / f"{name}.yaml"))
    return small_model(architecture=component("model", section))


@pytest.mark.parametrize(
    ("eraser", "model"),
    [
        pytest.param(eraser, model, marks=() if (eraser, model) in COVERED else pytest.mark.slow)
        for eraser in ERASERS
        for model in NETWORKS
    ],
)
def test_every_eraser_works_on_every_network_or_says_that_it_does_not(eraser: str, model: str) -> None:
    """The same layout, finite weights, the input untouched; a refusal is one line and comes from `check_model`."""
    part, victim, clean = component("eraser", shortened(eraser)), network(model), spotted(24)
    if (eraser, model) in REFUSED:
        with pytest.raises(ConfigError) as complaint:
            part.check_model(victim)
        assert "\n" not in str(complaint.value)
        return
    if hasattr(part, "check_model"):
        part.check_model(victim)
    before = weights_of(victim).clone()
    erased, _ = part.erase(victim, clean, {}, server_context(victim, clean))
    assert torch.equal(weights_of(victim), before)
    assert Layout.of(erased) == Layout.of(victim)
    if (eraser, model) in MAY_DIVERGE and not torch.isfinite(weights_of(erased)).all():
        assert refusal(victim, erased, clean, 0.0) is not None
        return
    assert torch.isfinite(weights_of(erased)).all()
    assert erased.taps == victim.taps
