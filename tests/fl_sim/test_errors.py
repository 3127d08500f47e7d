"""Complaints of one line."""

from __future__ import annotations

import pytest

from fl_sim.errors import ConfigError, require


def test_key_value_and_what_is_allowed() -> None:
    assert str(ConfigError("rounds", "ten", "must be a whole number")) == "rounds=ten: must be a whole number"
    assert str(ConfigError("init", None, "is missing")) == "init=null: is missing"


def test_seen_from_the_enclosing_section() -> None:
    error = ConfigError("size", 0, "must be 1 or more").within("trigger")
    assert str(error) == "trigger.size=0: must be 1 or more"
    assert error.within("outer").key == "outer.trigger.size"
    assert ConfigError("", "cnn", "no").within("model").key == "model"


def test_always_one_short_line() -> None:
    """A value of more than 60 characters is cut to 57 and three dots; line breaks become spaces."""
    text = str(ConfigError("key", "a\nb\n" + "x" * 100, "no"))
    assert text == "key=a b " + "x" * 53 + "...: no"


def test_require() -> None:
    require(True, "key", 1, "fine")
    with pytest.raises(ConfigError, match="key=1: not fine"):
        require(False, "key", 1, "not fine")
