"""The ways in which fl-sim says no: a setting or a folder that can't be used, and a run that can't go on."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that can't be used; says the key, the value and what is allowed, in one line."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        self.key, self.value, self.allowed = key, value, allowed
        said = _short(value)
        # `~key` and `--option` have no value to show.
        super().__init__(f"{key}: {allowed}" if key[:1] in ("~", "-") and not said else f"{key}={said}: {allowed}")

    def within(self, prefix: str) -> ConfigError:
        """The same complaint, seen from the enclosing section of the configuration."""
        return ConfigError(f"{prefix}.{self.key}" if self.key else prefix, self.value, self.allowed)


class RunError(RuntimeError):
    """A run that can't go on, for a reason that one line tells."""


class FolderError(RunError):
    """A run folder, or a file of one, that a command was given and can't use: as much a wrong wish as a bad setting."""


class InjectedCrash(RuntimeError):
    """What a client raises because `faults=` says so: no fault of the program or of a setting."""


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise a `ConfigError` about `key` unless the condition holds."""
    if not holds:
        raise ConfigError(key, value, allowed)


def _short(value: object) -> str:
    text = " ".join(("null" if value is None else str(value)).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
