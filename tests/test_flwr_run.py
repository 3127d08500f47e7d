"""`flwr run .`: what Flower's own command needs of this project, and a whole run under it."""

from __future__ import annotations

import io
import json
import shlex
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
from flwr.app import Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate

import fl_sim
import server.app
from clients.app import app as client_app
from fl_sim.build import config_text, to_text
from fl_sim.composing import compose_config
from fl_sim.engines.inprocess import RUN_ID, InProcessGrid
from fl_sim.errors import ConfigError, RunError
from fl_sim.rounds import Federation

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEFAULTS: dict[str, Any] = PYPROJECT["tool"]["flwr"]["app"]["config"]
"""Flower's run config, as `flwr run .` hands it over where nothing is overridden."""


def under_flower(nodes: int = 6, **run_config: Any) -> None:
    """Run the two apps as Flower does: the same run config for both, nothing of fl-sim's around them."""
    config = DEFAULTS | {"patience-seconds": 0} | run_config
    grid = InProcessGrid(client_app, nodes, config, workers=1)
    try:
        server.app.app(grid, Context(RUN_ID, 1, {}, RecordDict(), dict(config)))
    finally:
        grid.close()


def test_flower_finds_the_version_that_fl_sim_says() -> None:
    """Flower reads it from pyproject.toml and takes no other place for it."""
    assert PYPROJECT["project"]["version"] == fl_sim.__version__


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own
def test_flower_takes_the_project_for_an_app_and_packs_what_it_needs() -> None:
    """All of the four packages and the configuration; no tests, results or runs."""
    config, warnings = load_and_validate(ROOT / "pyproject.toml")
    assert warnings == []
    assert config["project"]["name"] == "fl-sim"
    packed = build_fab_from_disk(ROOT)
    names = set(zipfile.ZipFile(io.BytesIO(packed)).namelist())
    assert {"pyproject.toml", "fl_sim/rounds.py", "clients/app.py", "server/app.py", "conf/config.yaml"} <= names
    assert {"fl_sim/data/digits.py", "conf/data/digits.yaml"} <= names  # `data` is in .gitignore
    folders = {name.partition("/")[0] for name in names}
    assert folders <= {"fl_sim", "clients", "server", "defenses", "conf", "pyproject.toml", "LICENSE", ".info"}
    assert len(packed) < 2_000_000


def test_a_run_under_flower_leaves_what_any_run_leaves(tmp_path: Path) -> None:
    """The same files, the same numbers; and its configuration can be given as overrides or as JSON."""
    here = tiny.run(tmp_path / "here", *tiny.ERASING)
    overrides = shlex.join([*tiny.TINY, *tiny.ERASING, f"output={tmp_path / 'out'}"])
    under_flower(overrides=overrides)
    [folder] = [path.parent for path in (tmp_path / "out").glob("*/*/done")]
    assert tiny.numbers(folder) == tiny.numbers(here)
    assert {path.name for path in folder.iterdir()} == {path.name for path in here.iterdir()}
    assert json.loads((folder / "meta.json").read_text())["argv"] == ["flwr", "run"]
    text = to_text(compose_config([*tiny.TINY, *tiny.ERASING]))
    under_flower(config=text, folder=str(tmp_path / "named"))
    assert tiny.numbers(tmp_path / "named") == tiny.numbers(here)


def test_a_folder_that_is_there_already_goes_on(tmp_path: Path) -> None:
    """From its checkpoint: the first round is not run again."""
    folder = tmp_path / "run"
    whole = tiny.run(tmp_path / "whole")
    original = Federation._round
    begun: list[int] = []

    def noted(self: Federation, t: int) -> None:
        begun.append(t)
        if len(begun) == 2:
            raise KeyboardInterrupt
        original(self, t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "_round", noted)
        with pytest.raises(KeyboardInterrupt):
            under_flower(overrides=shlex.join(tiny.TINY), folder=str(folder))
        under_flower(overrides=shlex.join(tiny.TINY), folder=str(folder))
    assert begun == [1, 2, 2, 3]
    assert tiny.numbers(folder) == tiny.numbers(whole)


def test_too_few_nodes_are_said_with_what_to_do(tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(RunError, match=r'clients=6: only 5 nodes after 0 seconds; .*"num-supernodes=6"'):
        under_flower(nodes=5, overrides=shlex.join(tiny.TINY), folder=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_bad_overrides_are_refused_by_name() -> None:
    """In the words of `fl-sim run`."""
    with pytest.raises(ConfigError, match="rounds=ten: must be a whole number"):
        under_flower(overrides="rounds=ten")


def test_without_overrides_it_is_the_default_run() -> None:
    assert json.loads(config_text(DEFAULTS)) == compose_config([])


def orders(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> dict[tuple[int, int], dict[str, Any]]:
    """All that each client was sent, by round and client: the records' names, and the order's content."""
    sent: dict[tuple[int, int], dict[str, Any]] = {}
    original = InProcessGrid.send_and_receive

    def noted(self: InProcessGrid, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        messages = list(messages)
        for message in messages:
            order = dict(message.content.config_records["order"])
            round_, client = int(str(order["round"])), int(str(order["client"]))
            names = {f"{kind}.{name}" for kind, record in message.content.items() for name in record}
            sent[round_, client] = {"order": order, "names": names}
        return original(self, messages, timeout=timeout)

    with monkeypatch.context() as patch:
        patch.setattr(InProcessGrid, "send_and_receive", noted)
        tiny.run(folder, "clients_per_round=6", *overrides)
    return sent


def test_a_client_is_told_its_own_role_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An honest client's order has the model, its number, round and attempt, whoever else is malicious.

    Attackers are told how many they are and what they weigh, not who, and share what their trigger has learned.
    """
    attacked = orders(monkeypatch, tmp_path / "attacked", "attack=a3fl")
    peaceful = orders(monkeypatch, tmp_path / "peaceful", "attack=none")
    honest = {key: each for key, each in attacked.items() if not each["order"]["attack"]}
    assert len(attacked) == len(peaceful) == 18
    assert 0 < len(honest) < 18
    assert honest == {key: peaceful[key] for key in honest}
    nothing = {"attack": False, "rank": 0, "attackers": 0, "weight": 0.0, "attempt": 0}
    for (round_, client), each in honest.items():
        assert each["order"] == {"round": round_, "client": client} | nothing
        assert {name for name in each["names"] if not name.startswith("order.")} == {"model.vector"}
    attackers = [each for each in attacked.values() if each["order"]["attack"]]
    assert all(set(each["order"]) == {"round", "client", *nothing} for each in attackers)
    assert any("tensors.previous global vector" in each["names"] for each in attackers)
