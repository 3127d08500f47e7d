"""A run from its checked configuration to its finished folder; and its continuation."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from omegaconf import OmegaConf

from fl_sim.attention_picture import draw_attention
from fl_sim.build import config_hash, to_text, trackers_of, world_of
from fl_sim.central import accompany, run_central
from fl_sim.checkpoint import CHECKPOINT, check_checkpoint
from fl_sim.composing import CHOICES, GROUPS, Config
from fl_sim.console import CentralProgress, warn
from fl_sim.errors import ConfigError, FolderError, RunError, require
from fl_sim.finished import read_summary
from fl_sim.folder import fcntl, is_done, made, mark_done, provenance, read_json, read_yaml_text, write_json, write_text
from fl_sim.partition.picture import PICTURE, Counts, draw_partitions, title
from fl_sim.protocols import Follower
from fl_sim.summary import SUMMARY, summarise
from fl_sim.tracking import METRICS
from fl_sim.world import World

META = "meta.json"
DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EISDIR, errno.ENOTDIR),
)
"""What a disk refuses, or a folder in a file's place."""
LOCK = ".lock"
"""Held instead of the folder itself, where a file system can't lock folders."""


def prepare(config: Config, *, fresh: bool = True, foreign: bool = False) -> World:
    """Check everything and load the data, before a run folder exists. `foreign`: not on the engine it names."""
    try:
        world = world_of(to_text(config))
        _check_timeout(world, foreign)
        _check_erasers(world)
        if hasattr(world.parts.engine, "check_machine"):
            world.parts.engine.check_machine(world.parts.settings.device)
        if fresh:
            world.initial_model()  # finds a bad `init` now; a checkpoint holds all that it gave
    except RunError:
        raise
    except (MemoryError, RuntimeError) as error:
        if "memory" not in f"{type(error).__name__} {error}".lower():
            raise
        raise RunError(f"not enough memory for the data and the model ({str(error).splitlines()[0]})") from error
    return world


def _check_timeout(world: World, foreign: bool) -> None:
    """Whether the engine can stop waiting: a thread of this process can't be ended from outside."""
    able = foreign or getattr(world.parts.engine, "can_time_out", False)
    seconds = world.parts.settings.timeout
    allowed = "must be null with this engine, which can't end a client; engine=ray can, faults=stragglers simulates it"
    require(seconds is None or able, "timeout", seconds, allowed)


def _check_erasers(world: World) -> None:
    """Whether each eraser can work on the run's model: some need layers that not every network has."""
    parts = world.parts
    erasers: dict[str, Any] = {"eraser": parts.eraser}
    erasers |= {f"{key}.{name}": e for key in ("erasers", "baselines") for name, e in getattr(parts, key).items()}
    for key, eraser in erasers.items():
        if hasattr(eraser, "check_model"):
            try:
                eraser.check_model(world.worker_model())
            except ConfigError as error:
                raise error.within(key) from error


Execute: TypeAlias = Callable[[Config, World, Path], None]


def on_its_engine(config: Config, world: World, folder: Path) -> None:
    """Execute a run's rounds on the engine that its configuration names."""
    run_config = {"config": to_text(config), "folder": str(folder)}
    world.parts.engine.run(run_config, world.parts.settings.clients, world.device)


def start(config: Config, folder: Path, argv: list[str], execute: Execute = on_its_engine) -> dict[str, Any]:
    """Execute a run in a fresh folder; returns its summary. `argv` says whether it is a federated or a central one."""
    world = prepare(config, foreign=execute is not on_its_engine)
    with alone(folder):
        return _begin(config, world, folder, argv, execute)


def _begin(config: Config, world: World, folder: Path, argv: list[str], execute: Execute) -> dict[str, Any]:
    # The configuration last: where it is, a run can be resumed, and META says which kind of run.
    varying = _may_vary(config, world, central="central" in argv[1:2])
    meta = provenance(str(world.device), dict(config["seeds"]), argv) | {"may_vary": varying}
    write_json(folder / META, meta)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    try:
        return _to_end(config, world, folder, execute)
    except FolderError as error:  # nobody gave this folder: something has spoilt it meanwhile
        raise RunError(str(error)) from error


def _may_vary(config: Config, world: World, *, central: bool) -> list[str]:
    """The settings for which the same command, run again on this machine, may come to other numbers."""
    engine, timeout = config["engine"], config.get("timeout")
    found = {"engine.deterministic=false": not engine.get("deterministic", True) and world.device.type != "cpu"}
    if not central:
        found |= {
            "engine.clients=auto": engine.get("clients") == "auto",  # which is measured; other stacks, other last bits
            f"timeout={timeout}": timeout is not None,
            f"erasing={config[CHOICES]['erasing']}": getattr(world.parts.erasing, "by_clock", False),
        }
    return [setting for setting, varies in found.items() if varies]


def resume(folder: Path, execute: Execute = on_its_engine) -> dict[str, Any]:
    """Go on with an interrupted run from its last checkpoint; a finished one is left as it is."""
    if not folder.is_dir():
        raise FolderError(f"can't resume {folder}: no such folder")
    with alone(folder):
        return found(folder) or _go_on(folder, execute)


def _go_on(folder: Path, execute: Execute) -> dict[str, Any]:
    config = read_config(folder)
    fresh, foreign = not (folder / CHECKPOINT).exists(), execute is not on_its_engine
    world = prepare(config, fresh=fresh, foreign=foreign)
    if not is_central(folder):
        _check_record(folder)
        check_checkpoint(folder, world.new_model(), world.parts.settings.rounds)
    return _to_end(config, world, folder, execute)


def _check_record(folder: Path) -> None:
    """Refuse to begin a federated run over what `fl-sim central` has recorded: its record begins with its victim."""
    path = folder / METRICS
    if path.is_file() and not (folder / CHECKPOINT).exists():
        with path.open("rb") as file:
            if file.readline(100).startswith(b'{"event": "central"'):
                raise FolderError(
                    f"can't resume {folder}: its {METRICS} is of fl-sim central, its {META} says otherwise"
                )


def found(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that is finished; None if it is not."""
    there = is_done(folder) and (folder / SUMMARY).exists()
    return read_summary(folder / SUMMARY, is_central(folder)) if there else None


def take_up(config: Config, folder: Path, argv: list[str]) -> tuple[str, dict[str, Any]]:
    """Start, resume or find a sweep's run in the folder that is its own; returns which of them it was, and its summary.

    Which it is, is decided by whoever holds the folder: two sweeps of one name may come here at the same time.
    """
    world = prepare(config, fresh=not (folder / CHECKPOINT).exists())
    made(folder)
    with alone(folder):
        if (summary := found(folder)) is not None:
            return "found finished", summary
        if (folder / "config.yaml").exists():
            return "resumed", _go_on(folder, on_its_engine)
        return "finished", _begin(config, world, folder, argv, on_its_engine)


def read_config(folder: Path) -> Config:
    """The composed configuration that a run left; never composed anew."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise FolderError(f"{folder} is not a run folder: it has no config.yaml")
    text = read_yaml_text(path)
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except Exception as error:  # YAML's and OmegaConf's many kinds all mean the same here
        raise FolderError(f"can't read {path}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    if not isinstance(config, dict) or CHOICES not in config:
        raise FolderError(f"can't read {path}: it is not a run's configuration")
    _check_choices(config, path)
    return config


def _check_choices(config: Config, path: Path) -> None:
    """Whether a configuration says what was chosen of each group that it has: older ones have fewer groups."""
    chosen = config[CHOICES]
    if not isinstance(chosen, dict):
        raise FolderError(f"can't read {path}: its {CHOICES} are not a list of groups and what was chosen of them")
    for group in GROUPS:
        if (group in config and group not in chosen) or not isinstance(chosen.get(group), str | None):
            raise FolderError(f"can't read {path}: its {CHOICES} don't say which {group} was chosen")


class Busy(RunError):
    """A run folder in which another process is at work."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; two that write into one would spoil it. Freed even by `kill -9`.

    A disk that is full, or that may not be written on, is no fault of the program: it is said in a line.
    """
    try:
        with _locked(folder):
            yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = folder if error.filename is None else error.filename
        raise RunError(f"{where}: {error.strerror}; what was finished before is kept") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    with ExitStack() as held:
        handle = os.open(folder, os.O_RDONLY)
        held.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"{folder} is in use by another process") from error
        except OSError:  # NFS locks no folders, only files that are open for writing
            held.callback(os.close, _lock_file(folder))
        yield


def _lock_file(folder: Path) -> int:
    """Hold a hidden file of the folder instead."""
    assert fcntl is not None
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise Busy(f"{folder} is in use by another process") from error
    except OSError as error:
        warn(f"{folder} can't be locked here ({error.strerror}): see to it that only one process works in it")
    return handle


def is_central(folder: Path) -> bool:
    """Whether a run folder is one of `fl-sim central`."""
    if not (folder / META).exists():
        return False
    argv = read_json(folder / META).get("argv")
    if not isinstance(argv, list):
        raise FolderError(f"can't read {folder / META}: it does not say which command made the run")
    return "central" in argv[1:2]


def _to_end(config: Config, world: World, folder: Path, execute: Execute) -> dict[str, Any]:
    if is_central(folder):
        return _central_to_end(config, world, folder)
    return _run_to_end(config, world, folder, execute)


def _identity(config: Config, world: World) -> dict[str, Any]:
    settings = world.parts.settings
    return {
        "name": settings.name,
        "seed": settings.seed,
        "choices": config[CHOICES],
        "config_hash": config_hash(config),
    }


def _central_to_end(config: Config, world: World, folder: Path) -> dict[str, Any]:
    with _followed(config, folder) as trackers:
        with world.parts.engine.computing(), CentralProgress(world.parts.settings.name) as progress:
            result = run_central(config, world, folder, progress, *trackers)
        summary = _identity(config, world) | result
        write_json(folder / SUMMARY, summary)
        draw_attention(folder)
        for tracker in trackers:
            tracker.end(summary)
    mark_done(folder)
    return summary


def _run_to_end(config: Config, world: World, folder: Path, execute: Execute) -> dict[str, Any]:
    settings = world.parts.settings
    with _followed(config, folder) as trackers:
        try:
            execute(config, world, folder)
        except ConfigError as error:
            raise RunError(str(error)) from error
        if world.parts.baselines:
            with world.parts.engine.computing(), CentralProgress(settings.name) as progress:
                accompany(config, world, folder, progress, *trackers)
        identity = _identity(config, world)
        identity["malicious_clients"] = len(world.malicious) if world.parts.attack is not None else 0
        draw_partitions({title(config): Counts.of(world)}, folder / PICTURE)
        summary = summarise(folder, identity)
        draw_attention(folder)
        for tracker in trackers:
            tracker.end(summary)
    mark_done(folder)
    return summary


@contextmanager
def _followed(config: Config, folder: Path) -> Iterator[Sequence[Follower]]:
    """The run's trackers, which are closed however it ends."""
    try:
        trackers = trackers_of(to_text(config), folder)
    except ConfigError as error:
        raise RunError(str(error)) from error
    try:
        yield trackers
    finally:
        trackers_of.cache_clear()
        for tracker in trackers:
            tracker.close()
