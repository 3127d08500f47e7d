"""Types by signature: what is taken, what is refused, and in which words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fl_sim.backdoor import Goal
from fl_sim.errors import ConfigError, require
from fl_sim.schema import Schedule, construct, convert, locate, unknown


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (0.5, float, 0.5),
        (True, bool, True),
        ("a", str, "a"),
        (7, str, "7"),  # YAML reads name=7 as a number
        (None, int | None, None),
        (4, int | None, 4),
        ("auto", int | Literal["auto"], "auto"),
        (4, int | Literal["auto"], 4),
        (2, float | Literal["auto"], 2.0),
        ("b", Literal["a", "b"], "b"),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ([1, 2], list[int], (1, 2)),
        (["a"], Sequence[str], ("a",)),
        ([], tuple[int, ...], ()),
        ({"a": 1}, dict[str, Any], {"a": 1}),
        ({"every": 5}, Schedule, Schedule(5)),
        ({"_target_": "fl_sim.schema.Schedule", "every": 2}, Any, Schedule(2)),
        ("anything", Any, "anything"),
    ],
)
def test_what_is_taken(value: object, hint: object, expected: object) -> None:
    converted = convert("key", value, hint)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "allowed"),
    [
        ("ten", int, "must be a whole number"),
        ("3", int, "must be a whole number"),
        (3.0, int, "must be a whole number"),
        (True, int, "must be a whole number"),
        (None, int, "must be a whole number"),
        ("0.1", float, "must be a number"),
        (True, float, "must be a number"),
        (math.nan, float, "must be a number"),
        (math.inf, float, "must be a number"),
        (10**400, float, "must be a number"),  # too large for a float
        (1, bool, "must be true or false"),
        ("true", bool, "must be true or false"),
        (None, str, "must be text"),
        ([1], str, "must be text"),
        (True, str, "must be text"),
        ("c", Literal["a", "b"], "must be a, b"),
        ("no", int | Literal["auto"], "must be a whole number or auto"),
        ("no", float | None, "must be a number or null"),
        (5, tuple[float, ...], "must be a list, such as [1,2]"),
        ("12", tuple[int, ...], "must be a list, such as [1,2]"),
        ([1, "x"], tuple[float, ...], "must be a number"),
        (5, Schedule, "must be a section with keys of its own"),
        (None, Schedule, "must be a section with keys of its own"),
    ],
)
def test_what_is_refused(value: object, hint: object, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert("key", value, hint)
    assert (caught.value.key, caught.value.allowed) == ("key", allowed)


@dataclass(frozen=True)
class Part:
    size: int
    rate: float = 0.5
    goal: Goal = field(default_factory=Goal)
    extra: int | None = None

    def __post_init__(self) -> None:
        require(self.size > 0, "size", self.size, "must be above 0")


class Plain:
    """A component need not be a dataclass."""

    def __init__(self, size: int, shared: object = None) -> None:
        self.size, self.shared = size, shared


def test_construct_converts_and_leaves_out_what_describes() -> None:
    values = {"_target_": "x", "paper": "p", "fidelity": "f", "size": 2, "rate": 1, "goal": {"target": 3}}
    assert construct(Part, values) == Part(2, 1.0, Goal(target=3))


def test_construct_hands_over_what_the_caller_gives() -> None:
    shared = object()
    built = construct(Plain, {"size": 2}, {"shared": shared, "unwanted": 1})
    assert built.shared is shared
    with pytest.raises(ConfigError, match="unknown key"):
        construct(Plain, {"size": 2, "shared": 1}, {"shared": shared})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "size=null: is missing"),
        ({"size": 0}, "size=0: must be above 0"),
        ({"size": "big"}, "size=big: must be a whole number"),
        ({"size": 1, "rat": 2}, "rat=2: unknown key; did you mean rate?"),
        ({"size": 1, "zzz": 2}, "zzz=2: unknown key; there are size, rate, goal, extra"),
        ({"size": 1, "goal": {"target": "x"}}, "goal.target=x: must be a whole number"),
        ({"size": 1, "goal": {"targt": 1}}, "goal.targt=1: unknown key; did you mean target?"),
        ({"size": 1, "goal": {"rule": "none"}}, "goal.rule=none: must be auto, all_to_one, all_to_all"),
    ],
)
def test_complaints_name_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        construct(Part, values)
    assert str(caught.value).startswith(message)


def test_unknown_key_of_something_without_keys() -> None:
    assert unknown("x", []) == "unknown key; there are none here"


@pytest.mark.parametrize(
    "target", ["", "nodots", "fl_sim.none.X", "fl_sim.schema.Nothing", "fl_sim.schema.META", ".x", 5]
)
def test_what_cannot_be_imported_is_a_config_error(target: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        locate(target)
    assert caught.value.key == "_target_"


def test_locate() -> None:
    assert locate("fl_sim.schema.Schedule") is Schedule


@pytest.mark.parametrize(("every", "due"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_schedules_are_due_every_so_often_and_after_the_last_round(every: int, due: list[int]) -> None:
    assert [t for t in range(1, 6) if Schedule(every).due(t, 5)] == due
