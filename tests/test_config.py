"""Configurations: every file composes and builds, and everything strange is refused in one line that names the key."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
from omegaconf import OmegaConf

from fl_sim import composing, execution
from fl_sim.build import ABSENT, build, config_hash, describe
from fl_sim.cli import _split, main
from fl_sim.composing import GROUPS, choices, compose_config, conf_folder, jobs, parse
from fl_sim.composing import search_folders as folders_of
from fl_sim.errors import ConfigError
from fl_sim.schema import META, locate

SWEEPS = {"launcher", "sweeper"}
"""Folders that are about sweeps, and no groups of a run's configuration."""
YAMLS = sorted(path for path in conf_folder().rglob("*.yaml") if path.parent.name not in {conf_folder().name, *SWEEPS})
GIVEN = {"attack": {"client"}, "tracker": {"folder", "config"}}
"""Parameters that the program hands to a component, not the configuration."""
HIDDEN = {"engine": {"server_app", "client_app"}}
"""Parameters that are there for other programs; a run's apps are no setting."""


def choice(path: Path) -> tuple[str, str]:
    return path.parent.name, path.stem


def test_every_folder_is_a_group_and_every_group_a_folder() -> None:
    """A folder that GROUPS lacks would be neither listed nor built; a group without a folder offers nothing."""
    assert {path.name for path in conf_folder().iterdir() if path.is_dir()} == set(GROUPS) | SWEEPS
    assert all(path.relative_to(conf_folder()).parts[:-1] == (path.parent.name,) for path in YAMLS)
    assert {group for group, _ in map(choice, YAMLS)} == set(GROUPS)
    assert len(YAMLS) >= 40


def pictures(root: Path) -> Path:
    """Names of image files, enough for the default run: nothing is opened before the data is loaded."""
    for number in range(400):
        folder = root / ("train" if number % 2 else "test") / f"class {number // 2 % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").touch()
    return root


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: "/".join(choice(path)))
def test_every_choice_composes_and_builds(path: Path, tmp_path: Path) -> None:
    """Choosing any one file beside the defaults gives a checked set of components, and says what was chosen."""
    group, name = choice(path)
    if group == "tracker" and name != "none" and find_spec(name) is None:
        pytest.skip(f"tracker={name} needs the extra `{name}`")
    needs = [f"data.root={pictures(tmp_path)}", "data.clean_fraction=0.5"] if name == "image_folder" else []
    config = compose_config([f"{group}={name}", *needs])
    parts = build(config)
    assert config["choices"][group] == name
    if group not in ("tracker", "experiment"):
        target = OmegaConf.load(path).get("_target_")
        assert getattr(parts, group) is None if target is None else isinstance(getattr(parts, group), locate(target))


@pytest.mark.parametrize("few", [7, pytest.param(80, marks=pytest.mark.slow)])
def test_what_is_put_together_is_what_hydra_composes(few: int) -> None:
    """Sections in the default's place, alone, beside another choice and under a preset: order of keys and all."""
    alone = [[f"{group}={name}"] for group, name in map(choice, YAMLS[:: len(YAMLS) // few])]
    pairs = [one + other for one, other in zip(alone, alone[2:], strict=False) if one[0][:5] != other[0][:5]]
    cases = [*alone, *pairs, ["experiment=nad_table", "eraser=anp"], ["+eraser=anp"], ["attack=dba", "attack=none"]]
    cases += [["eraser=none", "eraser=anp", "model=wrn_16_1", "eraser=pbe"]]
    cases += [["launcher=joblib"]]

    def composed() -> list[str]:
        found = []
        for case in cases:
            try:
                found.append(json.dumps(compose_config([*case, "rounds=3"])))
            except ConfigError as error:
                found.append(f"refused: {error}")
        return found

    ours = composed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composing, "_section", lambda path, state: None)
        assert composed() == ours
    assert sum(not text.startswith("refused") for text in ours) > few


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: "/".join(choice(path)))
def test_a_file_lists_exactly_its_targets_parameters(path: Path) -> None:
    """So that reading a yaml shows every key there is, and none that does nothing."""
    group, _ = choice(path)
    section: Any = OmegaConf.to_container(OmegaConf.load(path)) or {}
    if group == "experiment":
        assert "_target_" not in section  # presets only override
        return
    if "_target_" not in section:
        assert group in ABSENT
        assert section == {}
        return
    keys = [key for key in section if key not in META and key != "_target_"]
    expected = set(inspect.signature(locate(section["_target_"])).parameters)
    assert set(keys) == expected - GIVEN.get(group, set()) - HIDDEN.get(group, set())


def test_the_default_configuration_is_what_the_project_promises() -> None:
    """The default run of the README: digits, 20 clients, 10 a round, a fifth malicious, NAD every 10 of 30 rounds."""
    config = compose_config([])
    chosen = {"data": "digits", "partition": "dirichlet", "trigger": "badnets", "aggregator": "mean", "eraser": "nad"}
    assert chosen.items() <= config["choices"].items()
    assert (config["rounds"], config["clients"], config["clients_per_round"]) == (30, 20, 10)
    assert (config["threat"]["fraction"], config["erasing"]["rounds"], config["seed"]) == (0.2, 10, 0)


def test_seeds_default_to_the_seed_and_can_be_set_apart() -> None:
    """`seeds.*` follow `seed` one by one, which is what makes paired comparisons possible."""
    assert compose_config(["seed=7"])["seeds"] == {"data": 7, "threat": 7, "train": 7}
    assert compose_config(["seed=7", "seeds.train=8"])["seeds"] == {"data": 7, "threat": 7, "train": 8}


# The hash that names a sweep's folders --------------------------------------------------------------------------------


def leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def other(value: Any) -> Any:
    """Any value that differs."""
    return f"{value}x" if isinstance(value, str) else not value if isinstance(value, bool) else 4711


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    copy = OmegaConf.create(config)
    OmegaConf.update(copy, key, value)
    result: Any = OmegaConf.to_container(copy)
    return dict(result)


def test_the_hash_ignores_the_name_and_place_and_depends_on_all_else() -> None:
    """Two runs share a sweep's folder if and only if their numbers must be equal."""
    config = compose_config([])
    hashes = {}
    for key, value in leaves(config):
        hashes[key] = config_hash(changed(config, key, other(value)))
    same = {key for key, hashed in hashes.items() if hashed == config_hash(config)}
    assert same == {"name", "output", *(f"choices.{group}" for group in GROUPS)}
    different = [hashed for key, hashed in hashes.items() if key not in same]
    assert len(different) == len(set(different)) > 50
    assert config_hash(compose_config([])) == config_hash(config)


# What is refused ------------------------------------------------------------------------------------------------------

REFUSED = [
    # The list of the issue
    ("rounds=-1", "rounds"),
    ("rounds=ten", "rounds"),
    ("clients=0", "clients"),
    ("clients_per_round=999", "clients_per_round"),
    ("nonsense=1", "nonsense"),
    ("eraser=nda", "eraser"),
    ("eraser=[nad,fine_tune]", "eraser"),
    ("threat.fraction=1.5", "threat.fraction"),
    ("data.clean_fraction=0", "data.clean_fraction"),
    ("device=cuda:9", "device"),
    ("trigger.size=500", "trigger.size"),
    ("seed=abc", "seed"),
    ("data.subset=0", "data.subset"),
    ("eraser=none data.clean_fraction=0 aggregator=fltrust", "data.clean_fraction"),
    ("data=emnist data.split=foo", "data.split"),
    # Words that are no overrides
    ("seed", "seed"),
    ("=3", ""),
    ("=", ""),
    ("", ""),
    (" ", " "),
    ("seed==3", "seed"),
    ("seed=[1", "seed"),
    ('seed="abc', "seed"),
    ("seed: 3", "seed: 3"),
    (".seed=3", ".seed"),
    ("seed.=3", "seed."),
    ("@=3", ""),
    ("%=3", "%"),
    ("~", "~"),
    ("+", "+"),
    # Sweeps without -m
    ("seed=1,2", "seed"),
    ("rounds=range(1,3)", "rounds"),
    ("eraser=nad,none", "eraser"),
    ("eraser=choice(nad,none)", "eraser"),
    ("eraser=glob(*)", "eraser"),
    # Keys that there are not, and keys that can't go
    ("~eraser", "~eraser"),
    ("~seed", "~seed"),
    ("+foo=1", "foo"),
    ("++foo=1", "foo"),
    ("+seed=1", "seed"),
    ("+data.foo=1", "data.foo"),
    ("eraser.lrr=1", "eraser.lrr"),
    ("eraser.LR=1", "eraser.LR"),
    ("seeds.foo=3", "seeds.foo"),
    ("seed.x=3", "seed.x"),
    ("eraser.lr.x=3", "eraser.lr.x"),
    ("a.b.c=1", "a.b.c"),
    ("data.augment.foo=1", "data.augment.foo"),
    ("data/foo=x", "data/foo"),
    ("paper=3", "paper"),
    ("defaults=[]", "defaults"),
    ("hydra=foo", "hydra"),
    ("hydra.foo=1", "hydra.foo"),
    ("choices=3", "choices"),
    ("+choices.data=cifar10", "choices"),
    ("+experiment.rounds=1", "experiment"),
    ("+tracker.foo=1", "tracker.foo"),
    ("engine.client_app=nope", "engine.client_app"),
    ("+engine.client_app=nope", "engine.client_app"),
    ("+engine.client_app=os:path", "engine.client_app"),
    ("+engine.server_app=os:nope", "engine.server_app"),
    ("engine=batched +engine.server_app=clients.app:app", "engine.server_app"),
    ("model=resnet18 model.width=3", "model.width"),
    ("aggregator.trim=0.1", "aggregator.trim"),
    ("eraser=none eraser.lr=1", "eraser.lr"),
    ("attack=none attack.boost=2", "attack.boost"),
    # Choices that there are not
    ("data=mnist9", "data"),
    ("data=null", "data"),
    ("eraser=", "eraser"),
    ("eraser=null", "eraser"),
    ("eraser=NAD", "eraser"),
    ("client=5", "client"),
    ("client={lr:1}", "client"),
    ("engine={}", "engine"),
    ("experiment=foo", "experiment"),
    ("experiment=null", "experiment"),
    # Unicode
    ("rounds=💥", "rounds"),
    ("name=ä/b", "name"),
    ("clé=1", "clé"),
    ("rounds=３", "rounds"),
    # Nothing where something is needed
    ("seed=", "seed"),
    ("rounds=", "rounds"),
    ("name=", "name"),
    ("output=", "output"),
    ("device=", "device"),
    ("seed=null", "seed"),
    ("seeds=null", "seeds"),
    ("backdoor=null", "backdoor"),
    ("client.lr=null", "client.lr"),
    ("engine.workers=null", "engine.workers"),
    ("data.augment=null", "data.augment"),
    # Numbers that are none, and too large ones
    ("rounds=nan", "rounds"),
    ("rounds=inf", "rounds"),
    ("rounds=1e3", "rounds"),
    ("rounds=3.0", "rounds"),
    ("seed=1e400", "seed"),
    ("seed=1.5", "seed"),
    ("client.lr=nan", "client.lr"),
    ("client.lr=inf", "client.lr"),
    ("client.lr=-inf", "client.lr"),
    ("attack.boost=inf", "attack.boost"),
    ("attack.boost=nan", "attack.boost"),
    ("eraser.weights=[nan]", "eraser.weights"),
    ("partition.alpha=inf", "partition.alpha"),
    ("rounds=99999999999999999999", "rounds"),
    ("clients=99999999999", "clients"),
    ("data.image_size=100000", "data.image_size"),
    # Booleans, texts, lists and sections in each other's place
    ("rounds=true", "rounds"),
    ("seed=false", "seed"),
    ("client.lr=true", "client.lr"),
    ("attack.boost=true", "attack.boost"),
    ("engine.workers=true", "engine.workers"),
    ("eraser.weights=[true]", "eraser.weights"),
    ("name=true", "name"),
    ("client.augment=1", "client.augment"),
    ("client.augment=yes", "client.augment"),
    ("client.lr=fast", "client.lr"),
    ("client.lr=[1]", "client.lr"),
    ("client.lr={a:1}", "client.lr"),
    ("client.epochs=2.5", "client.epochs"),
    ("eraser.weights=3", "eraser.weights"),
    ("eraser.weights=[a]", "eraser.weights"),
    ("seeds=3", "seeds"),
    ("seeds.train=abc", "seeds.train"),
    ("data.augment=3", "data.augment"),
    ("eval=3", "eval"),
    ("output=[a]", "output"),
    ("backdoor.rule=[all_to_one]", "backdoor.rule"),
    # Interpolations into nothing
    ("seed=${nope}", "seed"),
    ("seed=${seed}", "seed"),
    ("seed=${data.root}", "seed"),
    ("seed=${oc.env:FL_SIM_NO_SUCH_VARIABLE}", "seed"),
    # Targets that are no such component
    ("eraser._target_=null", "eraser._target_"),
    ("eraser._target_=5", "eraser._target_"),
    ("eraser._target_=", "eraser._target_"),
    ("eraser._target_=nope.Nope", "eraser._target_"),
    ("eraser._target_=builtins.dict", "eraser._target_"),
    ("model=resnet18 model._target_=builtins.object", "model._target_"),
    ("model=resnet18 model._target_=fl_sim.__version__", "model._target_"),
    ("eraser=none +eraser._target_=clients.local.sgd.Sgd", "eraser._target_"),
    # Impossible values
    ("clients_per_round=0", "clients_per_round"),
    ("name=../x", "name"),
    ("name=.x", "name"),
    ("assumed_attackers=1", "assumed_attackers"),
    ("assumed_attackers=-0.1", "assumed_attackers"),
    ("eval.every=0", "eval.every"),
    ("checkpoint.every=0", "checkpoint.every"),
    ("client.epochs=0", "client.epochs"),
    ("client.batch_size=0", "client.batch_size"),
    ("client.lr=0", "client.lr"),
    ("client.momentum=1", "client.momentum"),
    ("client.weight_decay=-1", "client.weight_decay"),
    ("client=fedprox client.mu=-1", "client.mu"),
    ("attack.boost=0", "attack.boost"),
    ("attack.boost=foo", "attack.boost"),
    ("attack.mode=foo", "attack.mode"),
    ("attack.poison_rate=2", "attack.poison_rate"),
    ("attack.epochs=0", "attack.epochs"),
    ("attack.lr=0", "attack.lr"),
    ("model.width=0", "model.width"),
    ("model=wrn_16_1 model.depth=17", "model.depth"),
    ("data.image_size=4", "data.image_size"),
    ("data.augment.crop=-1", "data.augment.crop"),
    ("data=synthetic data.classes=1", "data.classes"),
    ("data=synthetic data.channels=2", "data.channels"),
    ("data=synthetic data.difficulty=-1", "data.difficulty"),
    ("partition.alpha=0", "partition.alpha"),
    ("threat=window threat.first=0", "threat.first"),
    ("threat=single_shot threat.at=0", "threat.at"),
    ("threat=every threat.rounds=0", "threat.rounds"),
    ("trigger.size=0", "trigger.size"),
    ("trigger=blend trigger.alpha=0", "trigger.alpha"),
    ("aggregator=trimmed_mean aggregator.trim=0.5", "aggregator.trim"),
    ("aggregator=krum aggregator.attackers=-1", "aggregator.attackers"),
    ("aggregator=multi_krum aggregator.keep=0", "aggregator.keep"),
    ("aggregator=norm_clipping aggregator.max_norm=0", "aggregator.max_norm"),
    ("server_optimizer.lr=0", "server_optimizer.lr"),
    ("server_optimizer=momentum server_optimizer.momentum=1", "server_optimizer.momentum"),
    ("server_optimizer=adam server_optimizer.beta1=1", "server_optimizer.beta1"),
    ("eraser.epochs=0", "eraser.epochs"),
    ("eraser.weights=[]", "eraser.weights"),
    ("eraser.weights=[-1]", "eraser.weights"),
    ("erasing.rounds=0", "erasing.rounds"),
    ("erasing.floor=2", "erasing.floor"),
    ("engine.workers=0", "engine.workers"),
    ("engine.workers=two", "engine.workers"),
    ("engine.precision=float16", "engine.precision"),
    ("backdoor.rule=foo", "backdoor.rule"),
    ("quorum=0", "quorum"),
    ("quorum=11", "quorum"),
    ("quorum=0.0", "quorum"),
    ("quorum=1.5", "quorum"),
    ("quorum=-0.5", "quorum"),
    ("quorum=half", "quorum"),
    ("quorum=true", "quorum"),
    ("quorum=null", "quorum"),
    ("below_quorum=stop", "below_quorum"),
    ("below_quorum=null", "below_quorum"),
    ("repeats=0", "repeats"),
    ("repeats=1.5", "repeats"),
    ("timeout=0", "timeout"),
    ("timeout=-1", "timeout"),
    ("timeout=soon", "timeout"),
    ("timeout=5", "timeout"),
    ("faults=drop", "faults"),
    ("faults.probability=0.1", "faults.probability"),
    ("faults=dropout faults.probability=1.1", "faults.probability"),
    ("faults=crashes faults.probability=-0.1", "faults.probability"),
    ("faults=crashes faults.kinds=[stale]", "faults.kinds"),
    ("faults=garbage faults.probability=often", "faults.probability"),
    ("faults=garbage faults.kinds=[]", "faults.kinds"),
    ("faults=garbage faults.kinds=[nan]", "faults.kinds"),
    ("faults=garbage faults.kinds=[stale,stale]", "faults.kinds"),
    ("faults=garbage faults.kinds=stale", "faults.kinds"),
    ("faults=stragglers faults.median=0", "faults.median"),
    ("faults=stragglers faults.spread=-1", "faults.spread"),
    ("faults=stragglers faults.deadline=0", "faults.deadline"),
    ("faults=stragglers faults.late=soon", "faults.late"),
    ("faults=mixed faults.dropout=2", "faults.dropout"),
    ("faults=mixed faults.crash=0.6 faults.garbage=0.6", "faults.garbage"),
    ("faults=mixed faults.deadline=null", "faults.deadline"),
    # Impossible combinations
    ("backdoor.target=10", "backdoor.target"),
    ("backdoor.source=10", "backdoor.source"),
    ("backdoor.rule=source_specific backdoor.source=0", "backdoor.source"),
    ("trigger.margin=7", "trigger.margin"),
    ("threat=window threat.first=5 threat.last=4", "threat.last"),
    ("sampler=fixed_malicious sampler.malicious_per_round=9", "sampler.malicious_per_round"),
    ("sampler=fixed_malicious threat.fraction=0.9", "sampler.malicious_per_round"),
    ("server_optimizer=adam attack.boost=auto", "attack.boost"),
    ("partition.min_samples=1000", "partition.min_samples"),
    ("data.clean_fraction=0.999", "partition.min_samples"),
    ("data.clean_fraction=0.001", "data.clean_fraction"),
    ("clients=1437 partition=iid", "clients"),
    ("data=synthetic data.samples=5", "data.samples"),
    ("data=synthetic data.samples=99999999999999999999", "data.samples"),
    # What this machine lacks
    ("device=tpu", "device"),
    ("device=cuda:x", "device"),
    ("device=0", "device"),
    ("data=cifar10 data.root=/nope", "data.root"),
    ("init=/nope.pt", "init"),
    ("init=true", "init"),
    ("init=/etc/passwd", "init"),
    ("hydra.searchpath=[file:///nope]", "hydra.searchpath"),
    ("hydra.searchpath=[pkg://nope.conf]", "hydra.searchpath"),
    ("hydra.searchpath=/tmp", "hydra.searchpath"),
]


def split(line: str) -> list[str]:
    """The words of a line of the table; a line without a proper second word is one word, blanks included."""
    words = line.split(" ")
    return words if len(words) > 1 and all("=" in word for word in words) else [line]


@pytest.mark.parametrize(("line", "key"), REFUSED, ids=[line or "nothing" for line, _ in REFUSED])
def test_a_setting_that_cannot_be_used_is_refused_by_name(line: str, key: str) -> None:
    """Before any work: a ConfigError, one short line, that begins with the key and says what would be allowed."""
    with pytest.raises(ConfigError) as caught:
        execution.prepare(compose_config(split(line)))
    message = str(caught.value)
    assert message.startswith((f"{key}=", f"{key}: ") if key.startswith("~") else f"{key}=")
    assert "\n" not in message
    assert caught.value.key == key
    assert caught.value.allowed


def test_the_table_of_refusals_tells_keys_apart() -> None:
    """The control of the table above: what differs from a refused line by one permitted value is accepted."""
    for line in ("rounds=1", "clients_per_round=20", "threat.fraction=1", "trigger.size=8", "seed=-5", "output=5"):
        execution.prepare(compose_config([line]))
    execution.prepare(compose_config(["data.clean_fraction=0", "eraser=none"]))
    execution.prepare(compose_config(["server_optimizer=adam", "attack.boost=2"]))
    execution.prepare(compose_config(["rounds=${clients}", "name=a-b_c.d", "engine.workers=3"]))


def test_a_misspelt_name_is_answered_with_the_right_one() -> None:
    """The message helps: the nearest choice, the nearest key, and the list of what there is."""
    for line, hint in (("eraser=nadd", "did you mean nad?"), ("client.epoch=3", "did you mean epochs?")):
        with pytest.raises(ConfigError, match="did you mean") as caught:
            build(compose_config([line]))
        assert hint in str(caught.value)
    with pytest.raises(ConfigError, match="fine_pruning, fine_tune"):
        compose_config(["eraser=xyz"])


@pytest.mark.parametrize(
    "line",
    [
        "data=synthetic data.samples=99999999999",
        "data=synthetic data.test_samples=2147483648 data.image_size=32",
        "model.width=1000000",
    ],
)
def test_what_does_not_fit_into_memory_is_one_line_too(
    line: str, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A data set or model of terabytes is possible in principle, so it is no wrong setting; but still no traceback."""
    assert main(["run", *line.split()]) == 1
    assert capsys.readouterr().err.startswith("fl-sim: not enough memory")
    assert list(cwd.iterdir()) == []


# Sweeps ---------------------------------------------------------------------------------------------------------------


def test_jobs_are_the_product_of_all_lists() -> None:
    """3 erasers × 3 seeds are nine runs, each with every single value."""
    found = jobs(["eraser=none,fine_tune,nad", "seed=range(0,3)", "name=x"])
    assert len(found) == 9
    assert found[0] == ["eraser=none", "seed=0", "name=x"]
    assert len({tuple(job) for job in found}) == 9


# Choices from outside -------------------------------------------------------------------------------------------------

OUTSIDE = '''\
"""An eraser of a user's own."""

from copy import deepcopy
from dataclasses import dataclass

from fl_sim.errors import require


@dataclass(frozen=True)
class Shrink:
    """Multiplies the last layer by `factor`."""

    factor: float = 0.5
    needs_clean = False

    def __post_init__(self):
        require(self.factor > 0, "factor", self.factor, "must be above 0")

    def erase(self, model, clean, state, ctx):
        copy = deepcopy(model)
        copy.head.weight.data.mul_(self.factor)
        return copy, {"erasings": int(state.get("erasings", 0)) + 1}
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user's own choices, and an importable module beside it."""
    (tmp_path / "my_erasers.py").write_text(OUTSIDE)
    choice_file = tmp_path / "my_conf" / "eraser" / "shrink.yaml"
    choice_file.parent.mkdir(parents=True)
    choice_file.write_text('_target_: my_erasers.Shrink\npaper: "Nobody 2031"\nfidelity: own\nfactor: 0.25\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_choice_from_outside_composes_builds_and_is_checked(outside: Path) -> None:
    """`hydra.searchpath` adds choices to a group; their keys, types and values are checked like our own."""
    path = f"hydra.searchpath=[file://{outside}/my_conf]"
    config = compose_config([path, "eraser=shrink"])
    assert config["choices"]["eraser"] == "shrink"
    assert build(config).eraser.factor == 0.25  # type: ignore[union-attr]
    execution.prepare(compose_config([path, "eraser=shrink", "data.clean_fraction=0"]))  # needs_clean = False
    for line, key in (("eraser.factor=-1", "eraser.factor"), ("eraser.factor=x", "eraser.factor")):
        with pytest.raises(ConfigError) as caught:
            build(compose_config([path, "eraser=shrink", line]))
        assert caught.value.key == key
    with pytest.raises(ConfigError, match=r"eraser\.facto=3: unknown key; did you mean factor"):
        compose_config([path, "eraser=shrink", "eraser.facto=3"])
    with pytest.raises(ConfigError, match="no such choice"):
        compose_config(["eraser=shrink"])


def test_a_choice_from_outside_is_listed(outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`fl-sim list` shows it with its sentence, paper and fidelity, among our own."""
    path = f"hydra.searchpath=[file://{outside}/my_conf]"
    folders = folders_of(parse([path]))
    assert ("shrink", "Multiplies the last layer by `factor`.", "Nobody 2031", "own") in describe("eraser", folders)
    assert set(choices("eraser", folders)) - set(choices("eraser", folders[:1])) == {"shrink"}
    assert main(["list", "eraser", "--config-dir", str(outside / "my_conf")]) == 0
    shown = capsys.readouterr().out
    assert "shrink" in shown
    assert "Nobody 2031" in shown
    assert "nad_official" in shown


def test_a_choice_from_outside_runs(outside: Path, cwd: Path) -> None:
    """The whole run, through the command line; a third of the erasings' effect is that the head is smaller."""
    words = [*tiny.TINY, "eraser=shrink", "erasing.rounds=1", "rounds=2", "output=here", "erasing.floor=0"]
    assert main(["run", "--config-dir", str(outside / "my_conf"), *words]) == 0
    [folder] = [path.parent for path in (cwd / "here").rglob("done")]
    assert [event["eraser"] for event in tiny.events(folder, "erase")] == ["shrink", "shrink"]
    assert [event["accepted"] for event in tiny.events(folder, "erase")] == [True, True]


def test_every_listed_component_has_its_sentence() -> None:
    """`fl-sim list` has a line to say about each choice; presets and empty choices speak by their first comment."""
    silent = [(group, name) for group in GROUPS for name, line, *_ in describe(group, [conf_folder()]) if not line]
    assert [entry for entry in silent if entry[0] != "experiment"] == []


def test_a_choice_that_cannot_be_imported_does_not_hide_the_others(tmp_path: Path) -> None:
    """It is listed with the reason."""
    (tmp_path / "eraser").mkdir()
    (tmp_path / "eraser" / "lost.yaml").write_text("_target_: nowhere.Lost\n")
    rows = {name: sentence for name, sentence, _, _ in describe("eraser", [conf_folder(), tmp_path])}
    assert "nowhere.Lost" in rows["lost"]
    assert rows["nad"].startswith("Fine-tunes a teacher")


def test_a_presets_control_needs_no_more_than_its_name() -> None:
    """`attack=none` beside a preset that sets keys of its attack: they go with it; what the new choice knows stays."""
    none = compose_config(["experiment=cifar10_small", "attack=none"])
    assert none["attack"] == {}
    other = compose_config(["experiment=cifar10_small", "attack=data_poisoning"])
    assert "boost" not in other["attack"]
    assert (other["attack"]["mode"], other["attack"]["poison_rate"]) == ("per_batch", 0.3)
    for config in (none, other):
        build(config)
    with pytest.raises(ConfigError, match=r"attack\.boost"):
        build(compose_config(["experiment=cifar10_small", "attack=data_poisoning", "+attack.boost=2"]))


# Choices composed once, values set on them ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["rounds=3", "trigger=blend", "trigger.alpha=0.3", "seed=7"],
        ["attack=model_replacement", "attack.boost=4", "name='a b=c, ${seed}'", "device=cpu"],
        ["experiment=fed_nad_small", "rounds=2", "data.root=null"],
        ["erasers=[nad,argd]", "data.augment={crop: 2}", "central.epochs=1e1"],
        ["rounds=1", "rounds=2", "~experiment", "+note=1"],
    ],
)
def test_values_set_on_kept_choices_are_what_hydra_composes(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing kept and every override given to Hydra: the same configuration, or the same complaint."""

    def composed() -> Any:
        try:
            return compose_config(overrides)
        except ConfigError as error:
            return str(error)

    kept = [composed(), composed()]
    monkeypatch.setattr("fl_sim.composing._is_value", lambda *_: False)
    assert [composed()] * 2 == kept


def test_a_changed_choice_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "eraser"
    folder.mkdir()
    file = folder / "mine.yaml"
    overrides = [f"hydra.searchpath=[file://{tmp_path}]", "eraser=mine", "seed=1"]
    for value in ("first", "second, longer"):
        file.write_text(f"_target_: defenses.nad.Nad\nsaid: {value}\n")
        assert compose_config(overrides)["eraser"]["said"] == value


ENDLESS = ("seed=range(0,99999999999999)", "seed=shuffle(range(0,99999999999999))", "seed=range(0,1,1e-300)")
UNREADABLE = (f"seed={'1' * 5000}", f"erasers={'[' * 3000}", "seed=range(0,10,0)", "seed=range(0,nan)")


@pytest.mark.parametrize(
    "word",
    ["seed=interval(0,1)", "eraser=glob(nop*)", "seed=range(0,100001)", *ENDLESS, *UNREADABLE],
    ids=lambda word: word[:40],
)
def test_what_is_no_list_of_runs_is_refused_in_a_line(word: str) -> None:
    with pytest.raises(ConfigError, match=r"is no list of values|asks for more than 100,000 runs|can't be read"):
        jobs(["rounds=2", word])


@pytest.mark.parametrize("name", ["cü=]d'e\"f,g h(:{", "c\\"])
def test_a_folder_of_choices_may_have_any_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Hydra's overrides have a meaning for is ordinary in a path: in lists, runs and sweeps."""
    (tmp_path / name / "eraser").mkdir(parents=True)
    (tmp_path / name / "eraser" / "mine.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert main(["list", "eraser", "--config-dir", name]) == 0
    assert "  mine " in capsys.readouterr().out
    assert main(["run", "--cfg", f"--config-dir={name}", "eraser=mine"]) == 0
    assert "eraser: mine" in capsys.readouterr().out
    overrides, _ = _split(["--config-dir", name, "eraser=none,mine"])
    assert [compose_config(job)["choices"]["eraser"] for job in jobs(overrides)] == ["none", "mine"]


def test_a_users_bad_file_is_one_line_and_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tabs, foreign encodings, lists, folders and an editor's dangling lock: only who asks for one is told of it."""
    folder = tmp_path / "eraser"
    (folder / "dir.yaml").mkdir(parents=True)
    (folder / ".#x.yaml").symlink_to("nobody@nowhere")
    for name, content in (("tab", b"a:\n\tb: 1"), ("latin", b"a: \xff"), ("list", b"- 1"), ("good", b"{}")):
        (folder / f"{name}.yaml").write_bytes(content)
    words = ["--config-dir", str(tmp_path)]
    assert main(["list", "eraser", *words]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"tab", "latin", "list", "good", "nad"} <= rows.keys()
    assert all(f"{name}.yaml" in rows[name] for name in ("tab", "latin", "list"))
    assert not rows.keys() & {"dir", ".#x"}
    assert main(["run", "--cfg", *words, "eraser=good"]) == 0
    capsys.readouterr()
    for word in ("eraser=tab", "eraser=latin", "eraser=list", "erasers=[tab]", "eraser.nope=1"):
        assert main(["run", "--cfg", *words, word]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith(f"fl-sim: {word.partition('=')[0].removesuffix('s')}")


def test_a_key_of_many_parts_is_refused_in_a_line() -> None:
    """It is too long for a file's name, which might be a group's, and too deep for OmegaConf."""
    for begin in ("+a", "a"):
        with pytest.raises(ConfigError, match="no key has more than 255 characters") as caught:
            compose_config([f"{begin}{'.b' * 3000}=1"])
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("line", "said"), [("def", "SyntaxError"), ("1 / 0", "ZeroDivisionError"), ("import nope", "nope")]
)
@pytest.mark.parametrize(
    ("word", "key"), [("+engine.client_app=broken:app", "engine.client_app"), ("+x", "eraser._target_")]
)
def test_what_a_users_module_raises_on_import_is_said(
    line: str, said: str, word: str, key: str, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the one line, whatever it is."""
    (cwd / "broken.py").write_text(f"{line}\n")
    monkeypatch.syspath_prepend(cwd)
    words = [word] if word != "+x" else ["eraser=fine_tune", "eraser._target_=broken.Eraser"]
    with pytest.raises(ConfigError, match=said) as caught:
        build(compose_config(words))
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


def test_files_are_read_as_they_are_written_whatever_the_locale(tmp_path: Path) -> None:
    """Some hold names of people: é and the like."""
    code = "import sys; from fl_sim.cli import main; sys.exit(main(['list', 'trigger']) or main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-X", "utf8=0", "-c", code, "run", "trigger=sig", "eraser=pbe", "--cfg"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
