"""The attack that a configuration names is the one that runs, in the malicious clients and in no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from clients.local.sgd import Sgd
from fl_sim import execution
from fl_sim.build import to_text, world_of
from fl_sim.composing import choices, compose_config, conf_folder
from fl_sim.protocols import ClientContext
from fl_sim.schema import locate

SMALL = ("data.samples=120", "clients_per_round=6", "rounds=2", "engine.workers=1")
ATTACKS = [name for name in choices("attack", [conf_folder()]) if name != "none"]
COLLUSIONS = [name for name in choices("collusion", [conf_folder()]) if name != "none"]


def test_there_is_something_to_dispatch() -> None:
    assert len(ATTACKS) >= 14
    assert len(COLLUSIONS) >= 3


def started(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    folder.mkdir()
    execution.start(config, folder, [])
    malicious = world_of(to_text(config)).malicious
    assert 0 < len(malicious) < 6
    assert [event["malicious"] for event in tiny.events(folder, "round")] == [len(malicious)] * 2
    assert tiny.events(folder, "client_failed") == []
    return malicious


@pytest.mark.parametrize("name", ATTACKS)
def test_the_named_attack_runs_in_every_malicious_client(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All six clients are in each of two rounds: the class of the yaml is asked by the malicious, knowing; the benign
    client's class by the others, unknowing. No update shares memory with another or with what was received."""
    config = tiny.tiny(f"attack={name}", *SMALL)
    kind: Any = locate(config["attack"]["_target_"])
    attacked: list[tuple[int, int]] = []
    honest: list[tuple[int, int]] = []
    vectors: list[Any] = []
    attacking, training = kind.update, Sgd.update

    def attack(self: Any, model: Any, samples: Any, ctx: ClientContext) -> Any:
        assert type(self) is kind
        assert ctx.threatening is not None
        attacked.append((ctx.round, ctx.client))
        update = attacking(self, model, samples, ctx)
        vectors.extend([update.delta, ctx.received])
        return update

    def train(self: Any, model: Any, samples: Any, ctx: ClientContext) -> Any:
        update = training(self, model, samples, ctx)
        if ctx.threatening is None:
            honest.append((ctx.round, ctx.client))
            vectors.append(update.delta)
        return update

    with monkeypatch.context() as patch:
        patch.setattr(kind, "update", attack)
        patch.setattr(Sgd, "update", train)
        malicious = started(tmp_path / "run", config)
    assert sorted(attacked) == [(t, client) for t in (1, 2) for client in sorted(malicious)]
    assert sorted(honest) == [(t, client) for t in (1, 2) for client in range(6) if client not in malicious]
    storages = {id(vector): vector.untyped_storage().data_ptr() for vector in vectors}  # all are still alive
    assert len(storages) == len(set(storages.values())) >= 12


@pytest.mark.parametrize("name", COLLUSIONS)
def test_the_named_collusion_tampers_once_a_round_with_the_malicious_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.tiny("attack=none", f"collusion={name}", *SMALL)
    kind: Any = locate(config["collusion"]["_target_"])
    asked: list[tuple[int, list[int]]] = []
    tampering = kind.tamper

    def tamper(self: Any, deltas: Any, malicious: Any, ctx: Any) -> Any:
        asked.append((ctx.round, [client for client, bad in zip(ctx.clients, malicious.tolist(), strict=True) if bad]))
        return tampering(self, deltas, malicious, ctx)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "tamper", tamper)
        malicious = started(tmp_path / "run", config)
    assert asked == [(t, sorted(malicious)) for t in (1, 2)]


FRESH = 70_001
"""A seed that nobody has tuned with."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "boost", "least"),
    [
        ("constrain_and_scale", 5, 0.9),
        ("pgd", 3, 0.9),
        ("neurotoxin", 3, 0.9),
        ("chameleon", 3, 0.9),
        ("pi_sba", 3, 0.9),
        ("adaptive", 5, 0.9),
    ]
    + [(name, None, 0.5) for name in ("pgd", "neurotoxin", "chameleon", "pi_sba", "contaminated")],
)
def test_undefended_averaging_takes_the_backdoor(name: str, boost: int | None, least: float, tmp_path: Path) -> None:
    """The default federation without an eraser: attackers hold a fifth of the weight on average, so without a boost the
    backdoor comes slowly and goes in rounds without them (over 0.5 in some round), boosted it is there (over 0.9).

    Rounds do not count in which the model has merely collapsed to the target; without an attack all stay below 0.3, and
    the attacked federation's final ACC is within 0.05 of that one's.
    """
    overrides = [f"attack={name}", *([f"attack.boost={boost}"] if boost else [])]
    peaks, last = [], []
    for at, chosen in enumerate((["attack=none"], overrides)):
        folder = tmp_path / str(at)
        folder.mkdir()
        execution.start(compose_config([*chosen, "eraser=none", f"seed={FRESH}"]), folder, [])
        rounds = tiny.events(folder, "round")
        peaks.append(max(event["asr"] for event in rounds if event["asr_unstamped"] < 0.1))
        last.append(rounds[-1]["acc"])
    assert peaks[0] < 0.3
    assert peaks[1] > least
    assert last[1] > last[0] - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["label_flip", "sign_flip", "gaussian", "ipm"])
def test_attacks_without_a_backdoor_do_harm_only(name: str, tmp_path: Path) -> None:
    """Untargeted: a stamp makes hardly any image the target class that was not taken for it before."""
    folder = tmp_path / "run"
    folder.mkdir()
    execution.start(compose_config([f"attack={name}", "eraser=none", f"seed={FRESH}"]), folder, [])
    last = tiny.events(folder, "round")[-1]
    assert last["asr"] - last["asr_unstamped"] < 0.3
