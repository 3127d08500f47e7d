"""Presets: the small variant of each keeps what its source is about, and each has its control."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fl_sim.build import build
from fl_sim.composing import compose_config, conf_folder, jobs

PRESETS = ("fed_nad", "pbe_plan", "backfed_default", "flpoison_default", "dba")


def overridden(config: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_a_small_preset_keeps_what_its_source_is_about(name: str) -> None:
    """The same data, clients, attack, trigger, target and eraser; fewer rounds and clients, and a smaller model."""
    full, small = compose_config([f"experiment={name}"]), compose_config([f"experiment={name}_small"])
    assert [config["name"] for config in (full, small)] == [name, f"{name}_small"]
    for group in ("data", "partition", "client", "attack", "trigger", "aggregator", "eraser", "erasing"):
        assert full["choices"][group] == small["choices"][group], group
    if name == "fed_nad":  # so few rounds get an opaque patch
        assert (full["trigger"].pop("opacity"), small["trigger"].pop("opacity")) == (0.4, 1.0)
    for key in ("backdoor.target", "attack.poison_rate", "attack.mode", "client.epochs", "partition", "trigger"):
        assert overridden(full, key) == overridden(small, key), key
    assert small["choices"]["model"] == "cnn" != full["choices"]["model"]
    assert small["rounds"] < full["rounds"]
    assert small["clients"] <= full["clients"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_control(name: str) -> None:
    """`attack=none` is all that it takes."""
    parts = build(compose_config([f"experiment={name}_small", "attack=none"]))
    assert parts.attack is None


def test_dba_fires_four_shots_each_as_strong_as_the_model() -> None:
    """Rounds 203, 205, 207, 209 of 210; weight 1/10, server rate 0.1, boost 100: 100 · 0.1 / 10 = 1. Small: 5 / 5."""
    for name, rounds in (("dba", [203, 205, 207, 209]), ("dba_small", [13, 15, 17, 19])):
        config = compose_config([f"experiment={name}"])
        parts = build(config)
        assert [t for t in range(1, config["rounds"] + 1) if parts.threat.active(t)] == rounds
        assert parts.server_optimizer.rate is not None
        assert config["attack"]["boost"] * parts.server_optimizer.rate / config["clients_per_round"] == pytest.approx(1)
        assert len(parts.threat.malicious(config["clients"], torch.Generator())) == 4


def test_shares_of_a_batch_are_the_sources_counts() -> None:
    """20 and 5 of 64 images."""
    for name, count in (("backfed_default", 20), ("dba", 5)):
        config = compose_config([f"experiment={name}"])
        assert round(config["attack"]["poison_rate"] * config["client"]["batch_size"], 9) == count


NADS = "badnets,trojan,blend,cl,sig,refool"
TABLES = {
    "nad_table": NADS,
    "argd_table": NADS,
    "rnp_table": "badnets,trojan,blend,cl,sig,dynamic,wanet,fc,dfst,lira,a_blend",
    "abl_table": "badnets,trojan,blend,dynamic,sig,cl,fc,dfst,lba,cba",
}
CLEAN_LABEL = {"sig", "cl", "fc"}


@pytest.mark.parametrize("small", [pytest.param("", marks=pytest.mark.slow), "_small"])
@pytest.mark.parametrize("name", TABLES)
def test_one_command_makes_a_papers_table(name: str, small: str) -> None:
    """The command in the preset's own comment: each of its attacks builds, poisons a tenth of all images, or four
    fifths of the target class's where labels stay true, and tries the same erasers."""
    text = (conf_folder() / "experiment" / f"{name}.yaml").read_text()
    assert f"experiment={name} " in text
    assert f"trigger={TABLES[name]}\n" in text
    runs = jobs([f"experiment={name}{small}", f"trigger={TABLES[name]}"])
    assert len(runs) == TABLES[name].count(",") + 1
    for job in runs:
        config = compose_config(job)
        parts = build(config)
        assert parts.settings.name == name + small
        trigger = config["choices"]["trigger"]
        goal = parts.settings.backdoor.resolved(parts.trigger)
        assert (goal.rule == "clean_label") == (trigger in CLEAN_LABEL), trigger
        rate = parts.settings.central.against(goal.rule).poison_rate
        assert rate == (0.8 if trigger in CLEAN_LABEL else 0.1), trigger
        assert list(parts.erasers) == list(compose_config([f"experiment={name}"])["erasers"])


def test_rnp_has_500_clean_images_and_abl_its_control() -> None:
    """500 of 50,000 and of a fifth of them; ABL sets 20 of 80 epochs aside to isolate, and plain training takes as
    many of the same numbers."""
    for name in ("rnp_table", "rnp_table_small"):
        parts = build(compose_config([f"experiment={name}"]))
        assert round(parts.data.clean_fraction * parts.data.facts.train_samples) == 500
        assert "rnp" in parts.erasers
    for name in ("abl_table", "abl_table_small"):
        config, control = compose_config([f"experiment={name}"]), compose_config([f"experiment={name}", "client=sgd"])
        assert (config["choices"]["client"], config["client"]["isolating"]) == ("abl", 0.25)
        assert control["choices"]["client"] == "sgd"
        assert config["central"] == control["central"]
        assert build(control).eraser is None
