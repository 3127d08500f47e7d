"""Keys that later versions added: a run from before them counts as one with their defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fl_sim.folder import conf_folder


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the present defaults where it lacks a key; nothing that it says is changed.

    A choice of one's own, which the installed configuration does not know, is taken as it is.
    """
    whole = _loaded(conf_folder() / "config.yaml")
    listed = [each for each in whole.get("defaults", ()) if isinstance(each, dict)]
    choices = {group: choice for each in listed for group, choice in each.items()} | dict(config["choices"])
    plain = {key: value for key, value in whole.items() if key not in ("defaults", *choices)}
    found = _filled(config, plain) | {"choices": choices}
    for group, choice in choices.items():
        known = _loaded(conf_folder() / group / f"{choice}.yaml")
        own = config.get(group)
        # Of a group that the run did not have at all, only the choice `none` is taken: it does nothing.
        if isinstance(own, Mapping) and own:
            found[group] = _filled(own, known)
    return found


def _filled(given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(given)
    for key, value in known.items():
        if isinstance(value, Mapping):
            if isinstance(given.get(key, {}), Mapping):
                found[key] = _filled(given.get(key, {}), value)
        elif key not in given and not (isinstance(value, str) and "${" in value):
            found[key] = value
    return found


@cache
def _loaded(path: Path) -> dict[str, Any]:
    """A file of the configuration; empty if there is none."""
    if not os.path.isfile(path):  # of a name that is too long it says no, where Path raises
        return {}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {key: _plain(value) for key, value in content.items()} if isinstance(content, dict) else {}


def _plain(value: Any) -> Any:
    """YAML's own reading takes 5e-4 for text; Hydra's does not."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, str) and value[:1].isdigit():
        try:
            return float(value)
        except ValueError:
            return value
    return value
