"""Run folders: where a run leaves its files."""

from __future__ import annotations

import json
import platform
import secrets
import string
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from fl_sim import __version__
from fl_sim.errors import ConfigError, FolderError
from fl_sim.writing import write_atomically

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

DONE = "done"
LONGEST = 1 << 18
"""Bytes of a configuration: fifty times as many as a run's has, and some seconds to parse."""
# The C loader is twenty times as fast as the one in Python, with which 500 configurations would take most of a minute.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def conf_folder() -> Path:
    """The configuration: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def new_run_folder(output: str, name: str) -> Path:
    """`<output>/<date>/<time>_<name>_<4 random letters>`, made."""
    now = datetime.now()
    letters = "".join(secrets.choice(string.ascii_lowercase) for _ in range(4))
    return made(Path(output) / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}_{name}_{letters}")


def sweep_folder(output: str, name: str, hashed: str, command: str = "run") -> Path:
    """`<output>/sweeps/<name>/<config hash>`, not made yet: the same run finds its folder again."""
    return Path(output) / "sweeps" / name / (hashed if command == "run" else f"{command}-{hashed}")


def made(folder: Path) -> Path:
    """The folder, after it has been made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("output", str(folder), f"can't make the run folder: {error.strerror or error}") from error
    return folder


@contextmanager
def waiting(lock: Path) -> Iterator[None]:
    """Hold a lock file, waiting for whoever holds it; freed even by `kill -9`. On Windows nobody waits."""
    with lock.open("wb") as handle:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_json(path: Path, content: object) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=2, allow_nan=False) + "\n").encode()))


def require_file(path: Path) -> None:
    """Refuse what is no file where a file should be: from a pipe or a device one would read for ever."""
    if path.exists() and not path.is_file():
        raise FolderError(f"can't read {path}: it is not a file")


def read_json(path: Path) -> dict[str, Any]:
    require_file(path)
    try:
        content = json.loads(path.read_bytes())
    except RecursionError as error:
        raise FolderError(f"can't read {path}: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise FolderError(f"can't read {path}: {error}") from error
    if not isinstance(content, dict):
        raise FolderError(f"can't read {path}: it is not a JSON object")
    return content


def read_yaml_text(path: Path) -> str:
    """A configuration's text, if it may be one that a run wrote: short, and with nothing that unfolds to more."""
    require_file(path)
    try:
        if path.stat().st_size > LONGEST:
            raise FolderError(f"can't read {path}: it has more than {LONGEST // 1024} KiB, no run writes so much")
        text = path.read_text(encoding="utf-8")
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=LOADER)):
            raise FolderError(f"can't read {path}: it has aliases (*name), no run writes them")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise FolderError(f"can't read {path}: {' '.join(str(error).split())[:200]}") from error
    return text


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def is_done(folder: Path) -> bool:
    return (folder / DONE).exists()


def mark_done(folder: Path) -> None:
    (folder / DONE).touch()


def provenance(device: str, seeds: dict[str, int], argv: list[str]) -> dict[str, Any]:
    """`meta.json`: what someone would need to know to run this again."""
    packages = ("torch", "torchvision", "flwr", "hydra-core", "numpy", "scikit-learn")
    return {
        "fl_sim": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "commit": _commit(),
        "platform": platform.platform(),
        "processor": _processor(),
        "device": device,
        "seeds": seeds,
        "argv": argv,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, with `+` if files were changed; None outside one."""
    here = Path(__file__).parent.parent
    if not (here / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
