"""What a sweep's command asks for: presets that sweep by themselves, launchers, and the space of a search."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fl_sim.build import build
from fl_sim.cli import USAGE, main
from fl_sim.composing import compose_config, conf_folder, jobs
from fl_sim.errors import ConfigError
from fl_sim.launchers import Basic, Joblib, SubmititLocal, SubmititSlurm
from fl_sim.schema import locate
from fl_sim.search import Choices, Numbers, Search
from fl_sim.sweep_plan import plan, space

Capture = pytest.CaptureFixture[str]
PRESETS = {
    "attack_eraser": 75,
    "erasing_period": 30,
    "clean_set": 45,
    "malicious_fraction": 54,
    "alpha": 45,
    "poison_rate": 54,
}
FILES = sorted([*(conf_folder() / "launcher").glob("*.yaml"), *(conf_folder() / "sweeper").glob("*.yaml")])


# Presets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_of_a_sweep_sweeps_by_itself(name: str) -> None:
    """As many runs as its own comment says, over seeds, each of which composes; its command stands in the comment."""
    text = (conf_folder() / "experiment" / f"sweep_{name}.yaml").read_text()
    assert f"fl-sim run -m experiment=sweep_{name} ({PRESETS[name]} runs)" in text
    asked = plan([f"experiment=sweep_{name}"])
    found = jobs(asked.overrides)
    assert len(found) == len({tuple(job) for job in found}) == PRESETS[name]
    assert {word for job in found for word in job if word.startswith("seed=")} == {"seed=0", "seed=1", "seed=2"}
    assert (asked.launcher, asked.search) == (Basic(), None)
    for job in (found[0], found[-1]):
        assert build(compose_config(job)).settings.name == f"sweep_{name}"


def test_a_presets_values_are_overridden_by_the_commands() -> None:
    """One value or several: the preset's go. Without -m the preset is one run, of which the values are no part."""
    asked = plan(["experiment=sweep_alpha", "partition.alpha=0.5,2", "eraser=nad", "rounds=3"])
    found = jobs(asked.overrides)
    assert len(found) == 2 * 3
    assert found[0] == ["experiment=sweep_alpha", "partition.alpha=0.5", "eraser=nad", "rounds=3", "seed=0"]
    one = compose_config(["experiment=sweep_alpha"])
    assert one["partition"]["alpha"] == 1.0
    assert "hydra" not in one


def test_a_sweep_of_sweeps_is_refused(capsys: Capture, cwd: Path) -> None:
    """Several presets are fine as long as none brings a sweep of its own, whose values would be lost."""
    assert len(jobs(plan(["experiment=cifar10_small,fashion_small"]).overrides)) == 2
    assert main(["run", "-m", "experiment=cifar10_small,sweep_alpha"]) == USAGE
    assert capsys.readouterr().err.startswith("fl-sim: experiment=sweep_alpha: is a sweep of its own")


def test_a_users_own_preset_and_launcher(tmp_path: Path) -> None:
    """A folder of one's own, with Hydra's defaults lists: a lab's cluster, and a sweep on one's own base."""
    params = "{sweeper: {params: {rounds: 'range(1,4)', seed: '5,6'}}}"
    for name, text in {
        "launcher/lab.yaml": "defaults: [submitit_slurm]\npartition: gpu\naccount: lab\n",
        "experiment/mine.yaml": f"# @package _global_\nhydra: {params}\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    path = f"hydra.searchpath=[file://{tmp_path}]"
    asked = plan([path, "experiment=mine", "hydra/launcher=lab", "hydra.launcher.qos=long"])
    assert isinstance(asked.launcher, SubmititSlurm)
    assert (asked.launcher.partition, asked.launcher.account, asked.launcher.qos) == ("gpu", "lab", "long")
    assert len(jobs(asked.overrides)) == 3 * 2


# Launchers and sweepers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_lists_exactly_its_classs_keys_with_their_defaults(path: Path) -> None:
    """So that reading a yaml shows every key there is, and none that does nothing."""
    section: Any = OmegaConf.to_container(OmegaConf.load(path))
    parameters = inspect.signature(locate(section.pop("_target_"))).parameters
    assert section.keys() == parameters.keys()
    for key, value in section.items():
        if not isinstance(value, dict):
            assert parameters[key].default == value, key


@pytest.mark.parametrize(
    ("words", "launcher"),
    [
        (["hydra/launcher=basic", "hydra.launcher.jobs=auto"], Basic("auto")),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"], Joblib(3)),
        (["hydra/launcher=submitit_local", "hydra.launcher.mem_gb=4"], SubmititLocal(mem_gb=4.0)),
        (
            ["hydra/launcher=submitit_slurm", "hydra.launcher.additional_parameters={mail-user: me}"],
            SubmititSlurm(additional_parameters={"mail-user": "me"}),
        ),
    ],
)
def test_launchers_are_chosen_by_hydras_names(words: list[str], launcher: object) -> None:
    """None of these words is part of a run."""
    asked = plan(["seed=0,1", *words])
    assert asked.launcher == launcher
    assert asked.overrides == ["seed=0,1"]


WRONG = [
    (["hydra/launcher=submitit"], "hydra/launcher=submitit: no such choice; did you mean submitit_"),
    (["hydra/launcher=joblib", "hydra.launcher.n_job=2"], "hydra.launcher.n_job=2: unknown key; did you mean n_jobs?"),
    (["hydra/launcher=joblib", "hydra.launcher.n_jobs=two"], "hydra.launcher.n_jobs=two: must be a whole number"),
    (["hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0: must be a number of processes"),
    (["hydra/launcher=joblib", "--jobs", "2"], "--jobs=2: is for the basic launcher"),
    (["hydra.launcher.jobs=0"], "hydra.launcher.jobs=0: must be auto or a whole number"),
    (["hydra.launcher.jobs=1,2"], "hydra.launcher.jobs=1,2: takes one value"),
    (["hydra/sweeper=nevergrad"], "hydra/sweeper=nevergrad: no such choice"),
    (["hydra/sweeper=optuna"], "hydra.sweeper.optimize=null: must say what is searched for"),
    (["hydra/sweeper=optuna", "hydra.sweeper.optimize=asr"], "hydra.sweeper.optimize=asr: must"),
    (["hydra/sweeper=optuna", "hydra.sweeper.optimize=[test_acc,foo]"], "hydra.sweeper.optimize="),
    (["hydra/sweeper=optuna", "hydra.sweeper.optimize=test_acc", "hydra/sweeper/sampler=foo"], "hydra.sweeper.sampler"),
    (["hydra.mode=MULTIRUN"], "hydra.mode=MULTIRUN: fl-sim uses nothing"),
    (["experiment=sweep_alfa"], "experiment=sweep_alfa: no such choice; did you mean sweep_alpha?"),
]


@pytest.mark.parametrize(
    ("words", "complaint"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_wrong_plan_is_one_line_and_leaves_nothing(
    words: list[str], complaint: str, cwd: Path, capsys: Capture
) -> None:
    """Before any run: status 2, the key named."""
    assert main(["run", "-m", "seed=0,1", *words]) == USAGE
    shown = capsys.readouterr()
    assert shown.err.startswith(f"fl-sim: {complaint}")
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert list(cwd.iterdir()) == []


@pytest.mark.parametrize("word", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra/sweeper=optuna"])
def test_what_is_for_sweeps_is_refused_elsewhere(word: str, capsys: Capture) -> None:
    """A single run would silently do without."""
    assert main(["run", word]) == USAGE
    assert capsys.readouterr().err.endswith(": is for sweeps: add -m\n")


# The space of a search ------------------------------------------------------------------------------------------------


def test_the_space_is_read_in_hydras_grammar() -> None:
    """Intervals of numbers, whole ones, logarithmic ones; ranges without their end; choices as they were typed."""
    found = space(
        [
            "rounds=3",
            "attack.boost=int(interval(1,10))",
            "client.lr=tag(log, interval(1e-3,1e-1))",
            "attack.poison_rate=interval(0.1,1)",
            "erasing.rounds=range(2,11,3)",
            "data.clean_fraction=choice(0.05,0.1)",
            "eraser=nad,fine_tune",
            "seed=0,1",
            "seeds.data=4,5",
        ]
    )
    assert found.fixed == ["rounds=3"]
    assert found.searched == {
        "attack.boost": Numbers(1, 10, whole=True),
        "client.lr": Numbers(1e-3, 1e-1, log=True),
        "attack.poison_rate": Numbers(0.1, 1),
        "erasing.rounds": Numbers(2, 8, 3, whole=True),
        "data.clean_fraction": Choices(("0.05", "0.1")),
        "eraser": Choices(("nad", "fine_tune")),
    }
    assert len(found.repeats) == 4
    assert ["seed=1", "seeds.data=4"] in found.repeats
    for words in (["seed=0,1"], ["client.lr=tag(log, interval(0,1))"], ["client.lr=interval(1,1)"]):
        with pytest.raises(ConfigError):
            space(words)


def test_objectives_say_which_way_is_better_and_where_they_are_measured() -> None:
    """Accuracy up, attack success down; whoever wants the contrary says so."""
    both = Search(optimize=("test_acc", "test_asr"))
    assert (both.directions, both.sees_the_test_set) == (["maximize", "minimize"], True)
    assert Search(optimize="clean_acc").sees_the_test_set is False
    assert Search(optimize="test_asr", direction="maximize").directions == ["maximize"]
    for wrong in ({"direction": ("maximize",)}, {"n_trials": 0}, {"n_jobs": 0}):
        with pytest.raises(ConfigError):
            Search(**{"optimize": ("test_acc", "test_asr"), **wrong})  # type: ignore[arg-type]
