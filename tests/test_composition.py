"""Components compose by configuration alone: every pair of choices of two groups runs together, or is refused clearly.

A covering array over twelve groups, all names as they stand in conf/. Every run is tiny: two rounds, six clients, 8×8
images, every training cut to a step or two. What is tested is that it works at all, not how well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import tiny
from covering import Space, Value
from omegaconf import OmegaConf

from fl_sim import execution
from fl_sim.build import build, world_of
from fl_sim.cli import USAGE, main
from fl_sim.composing import choices, compose_config, conf_folder
from fl_sim.errors import ConfigError

REFUSED: dict[frozenset[Value], str] = {
    frozenset({("attack", attack), ("trigger", trigger)}): "changes no pixel of a plain image"
    for attack in ("a3fl", "cerp")
    for trigger in ("edge_case", "semantic")
}
"""Pairs that can't work together, and what the refusal says."""
OWN_TRIGGER = ("a3fl", "cerp", "iba")
UNTRIGGERED = ("none", "gaussian", "ipm", "sign_flip", "label_flip")
MASKS = (
    {("erasing", name): frozenset({"eraser"}) for name in ("never", "on_suspicion")}
    | {("eraser", "none"): frozenset({"erasing"})}
    | {("attack", name): frozenset({"trigger"}) for name in (*OWN_TRIGGER, *UNTRIGGERED)}
)
"""Where nothing erases, no eraser is tested, and so on."""
SHORT: dict[str, Any] = {
    **dict.fromkeys(("epochs", "teacher_epochs", "distillation_epochs", "unlearning_epochs", "recovery_epochs"), 1),
    **dict.fromkeys(("min_steps", "inner_min_steps", "unlearning_min_steps", "mask_steps", "warm_up"), 2),
    "steps": 2,
    "crafting_steps": 1,
    "gan_steps": 2,
    "samples": 16,
    "draws": 1,
    "coordinates": 100,
    "batch_size": 16,
    "latent": 8,
    "window": 1,
    "patience": 1,
    "share": 1.0,
}
"""For whichever components have these keys."""
FIXED = {
    "threat": {"fraction": 0.5, "at": 1},
    "erasing": {"floor": 0.0, "rounds": 1, "patience": 1, "share": 1.0},
    "attack": {"epochs": None},
}


def names(group: str) -> tuple[str, ...]:
    return tuple(choices(group, [conf_folder()]))


@cache
def space() -> Space:
    return Space({group: names(group) for group in tiny.COMPOSED}, MASKS, frozenset(REFUSED))


@cache
def rows(strength: int) -> list[dict[str, str]]:
    return space().array(strength)


def overrides(row: Mapping[str, str]) -> list[str]:
    """What a user would type."""
    base = [word for word in tiny.TINY if not word.startswith(("eraser", "client.", "threat."))]
    words = [*base, "data.clean_fraction=0.1", "rounds=2", "engine.workers=1"]
    for group, name in row.items():
        section: Any = OmegaConf.to_container(OmegaConf.load(choices(group, [conf_folder()])[name])) or {}
        words.append(f"{group}={name}")
        for path, value in shortened(section, FIXED.get(group, {})):
            words.append(f"{group}.{path}={'null' if value is None else value}")
    return words


def shortened(section: dict[str, Any], fixed: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        if isinstance(value, dict):
            found += [(f"{key}.{path}", less) for path, less in shortened(value, fixed)]
        elif key in fixed or key in SHORT:
            found.append((key, {**SHORT, **fixed}[key]))
    return found


def run(row: Mapping[str, str], folder: Path) -> None:
    """Two rounds, all clients' work done, erased where the policy says so, scored and summarised."""
    execution.start(compose_config(overrides(row)), folder, ["fl-sim", "run"])
    events = tiny.events(folder)
    rounds = [event for event in events if event["event"] == "round"]
    assert [event["round"] for event in rounds] == [1, 2]
    assert not [event for event in events if event["event"] == "client_failed"]
    if row["attack"] != "none" or row["collusion"] != "none":
        assert any(event["malicious"] for event in rounds)
    erasings = [event["round"] for event in events if event["event"] == "erase"]
    due = {"every": [1, 2], "at_end": [2], "budget": [1, 2], "never": []}
    if row["erasing"] in due:
        assert erasings == ([] if row["eraser"] == "none" else due[row["erasing"]])
    assert json.loads((folder / "summary.json").read_text())["rounds"] == 2
    assert (folder / "done").exists()


@pytest.fixture
def no_worlds() -> Iterator[None]:
    """None is kept for later."""
    yield
    world_of.cache_clear()


# The generator --------------------------------------------------------------------------------------------------------


def test_rows_are_few() -> None:
    """Three factors of two levels need 4 rows of 8, four of three levels 9 of 81; greed takes up to half as many more.
    Showing each level once takes as many rows as the largest factor has."""
    small = Space(dict.fromkeys("abc", ("0", "1")))
    assert 4 <= len(small.array()) <= 6
    assert 9 <= len(Space(dict.fromkeys("abcd", ("0", "1", "2"))).array()) <= 13
    assert len(Space({"a": ("0", "1", "2"), "b": ("0", "1")}).array(1)) == 3
    assert small.array() == small.array()


def test_a_refused_pair_is_in_no_row_and_a_masked_one_is_shown_elsewhere() -> None:
    """Where a=0, factor b is not at work: pairs of b and c need rows with a=1, but those of a=0 and b are shown."""
    never = frozenset({("b", "1"), ("c", "0")})
    refusing = Space(dict.fromkeys("abc", ("0", "1")), {("a", "0"): frozenset({"b"})}, frozenset({never}))
    found = refusing.array()
    assert not [row for row in found if never <= set(row.items())]
    shown = [row for row in found if row["a"] == "1"]
    assert {(row["b"], row["c"]) for row in shown} == {("0", "0"), ("0", "1"), ("1", "1")}
    assert {row["b"] for row in found if row["a"] == "0"} == {"0", "1"}


def test_the_array_shows_every_pair_of_choices() -> None:
    """Counted without the generator's own bookkeeping: each pair stands in a row in which no third value hides it."""
    found = rows(2)
    assert all(set(row) == set(tiny.COMPOSED) for row in found)
    for first, second in combinations(tiny.COMPOSED, 2):
        seen = {
            (row[first], row[second])
            for row in found
            if not {first, second}
            & {hidden for value in row.items() if value[0] not in (first, second) for hidden in MASKS.get(value, ())}
        }
        missing = set(product(names(first), names(second))) - seen
        assert {frozenset({(first, a), (second, b)}) for a, b in missing} <= set(REFUSED)
    assert not [row for row in found for pair in REFUSED if pair <= set(row.items())]


# The runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", REFUSED, ids=lambda pair: "-".join(name for _, name in sorted(pair)))
def test_pairs_that_cannot_work_are_refused(
    pair: frozenset[Value], cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any work, with one line that says why, and exit status 2."""
    words = [f"{group}={name}" for group, name in sorted(pair)]
    with pytest.raises(ConfigError, match=REFUSED[pair]):
        build(compose_config([*tiny.TINY, *words]))
    assert main(["run", *tiny.TINY, *words]) == USAGE
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(cwd.iterdir())


@pytest.mark.usefixtures("no_worlds")
@pytest.mark.parametrize("row", rows(1), ids=lambda row: "-".join(list(row.values())[:4]))
def test_every_choice_runs_among_others(row: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each is called, but those that another one leaves without work; policies are seen by when they erase."""
    hidden = {"erasing", *(group for value in row.items() for group in MASKS.get(value, ()))}
    calls = {group: tiny.calls_of(monkeypatch, group, name) for group, name in row.items() if group not in hidden}
    run(row, tmp_path)
    assert not [group for group, given in calls.items() if given == []]


@pytest.mark.slow
@pytest.mark.usefixtures("no_worlds")
@pytest.mark.parametrize("aggregator", names("aggregator"))
def test_every_pair_of_choices_runs(aggregator: str, tmp_path: Path) -> None:
    """All rows of one rule; what fails is told together, with its whole row."""
    failures = []
    for number, row in enumerate(row for row in rows(2) if row["aggregator"] == aggregator):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            run(row, folder)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error} in {row}")
    assert not failures, "\n".join(failures)
