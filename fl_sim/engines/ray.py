"""Flower's own simulation engine, which runs clients in the worker processes of Ray: many cores, GPUs or machines."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import ServerApp

from fl_sim.engines.carried import CarryingGrid, ClientFunction, call_with_state
from fl_sim.engines.flower import SERVER_NODE, simulation
from fl_sim.engines.inprocess import CLIENT_APP, RUN_ID, SERVER_APP, available_cores, check_apps, load_app
from fl_sim.engines.numerics import numerics, serving
from fl_sim.errors import ConfigError, RunError, require
from fl_sim.folder import fcntl
from fl_sim.interruption import STOPS
from fl_sim.models.classifier import Compute, Precision

FOLDER = "fl-sim-ray-"
YOUNG = 60
"""Seconds for which a folder is nobody's leavings, whatever its lock."""
LONGEST = 35
"""Letters of a folder that Ray's sockets may lie in: their whole names must not exceed 107."""
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class RayClient:
    """The ClientApp as a worker process calls it: on one torch thread, in the folder that the run was started in.

    The process keeps the data and the model from message to message, because `world_of` keeps them.
    """

    app: str
    run_config: Mapping[str, str]
    folder: str
    precision: Precision
    deterministic: bool

    def __call__(self, message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        if Path(self.folder).is_dir():  # another machine need not have it
            os.chdir(self.folder)
        app = cast(ClientFunction, load_app(self.app))
        with numerics(self.precision, self.deterministic):
            return call_with_state(app, message, self.run_config, context)


@dataclass(frozen=True)
class Ray:
    """Flower's simulation engine: clients in Ray's worker processes, on this machine or on a cluster.

    Each worker reserves `cpus` cores and a share `gpus` of a GPU; `auto` is one GPU if the run's device is one, else
    none. Without an `address`, a Ray of `workers` workers is started for this run and stopped after it; with one
    (HOST:PORT, or auto for the one started on this machine) the cluster takes as many workers as fit.
    """

    workers: int | Literal["auto"] = "auto"
    cpus: int = 1
    gpus: float | Literal["auto"] = "auto"
    address: str | None = None
    server_threads: int = 1
    precision: Precision = "float32"
    channels_last: bool = True
    deterministic: bool = True
    server_app: str = SERVER_APP
    client_app: str = CLIENT_APP
    can_time_out = True

    def __post_init__(self) -> None:
        usable = self.workers == "auto" or 1 <= self.workers <= 256
        require(usable, "workers", self.workers, "must be auto or from 1 to 256 processes")
        alone = self.address is None or self.workers == "auto"
        require(alone, "workers", self.workers, "must be auto with engine.address: as many as the cluster has room for")
        require(1 <= self.cpus <= 256, "cpus", self.cpus, "must be from 1 to 256 cores a client")
        share = self.gpus == "auto" or 0 <= self.gpus <= 1
        require(share, "gpus", self.gpus, "must be auto or the share of a GPU that a client needs, from 0 to 1")
        require(self.address is None or bool(self.address), "address", self.address, "must be null, auto or HOST:PORT")
        require(1 <= self.server_threads <= 256, "server_threads", self.server_threads, "must be from 1 to 256 threads")
        check_apps(self.server_app, self.client_app)

    @property
    def compute(self) -> Compute:
        return Compute(self.precision, self.channels_last)

    def check_machine(self, device: str) -> None:
        """Whether Ray is there, and the device is one that can be had in every worker."""
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("engine", "ray", 'needs Ray, which is not installed: pip install "fl-sim[ray]"')
        allowed = f"must be {', '.join(DEVICES)} with engine=ray, which gives each worker a GPU of its own"
        require(device in DEVICES, "device", device, allowed)

    def computing(self) -> AbstractContextManager[None]:
        """As the server computes: its threads, and a GPU's switches."""
        return serving(self.server_threads, self.precision, self.deterministic)

    def run(self, run_config: Mapping[str, str], clients: int, device: torch.device) -> None:
        """Execute one run, from its first round or from its checkpoint on."""
        server = cast(ServerApp, load_app(self.server_app))
        gpus = self.gpus if self.gpus != "auto" else float(device.type == "cuda")
        client = RayClient(
            self.client_app, self._workers_config(run_config, gpus), os.getcwd(), self.precision, self.deterministic
        )
        # A worker that dies is started again, and what it was doing is tried once more.
        resources = {"num_cpus": self.cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 1}
        with self._cluster(gpus), simulation(client, clients, resources, RUN_ID) as flower, self.computing():
            grid = CarryingGrid(flower.grid, flower.check, flower.workers.give_up)
            server(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), dict(run_config)))

    def _workers_config(self, run_config: Mapping[str, str], gpus: float) -> dict[str, str]:
        """The run's, but for the device: a worker sees the one GPU that it was given, or must not use any."""
        config = json.loads(run_config["config"]) | {"device": "cuda" if gpus else "cpu"}
        return {**run_config, "config": json.dumps(config, sort_keys=True)}

    @contextmanager
    def _cluster(self, gpus: float) -> Iterator[None]:
        """A connection to Ray; one that was started here is stopped again, and its files are removed."""
        # A worker without a GPU is told to compute on the CPU: Ray need not hide the GPUs from it, nor talk about it.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # on a busy machine 30 are too few
        import ray

        # What this process can import, a worker can: Ray itself hands on only the script's folder.
        found = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": found}}
        if self.address is None:
            folder, lock = _own_folder(Path(_short_folder()))
            # Before Ray's own: a Ray that was stopped while it started writes into its folder until the end.
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            workers = available_cores() // self.cpus if self.workers == "auto" else self.workers
            options |= {"num_cpus": max(workers, 1) * self.cpus, "num_gpus": None if gpus else 0}
            options |= {"_temp_dir": folder, "include_dashboard": False}
        elif (reason := _unreachable(self.address)) is not None:
            raise RunError(f"can't reach Ray at engine.address={self.address}: {reason}")
        try:
            with _signals_kept():
                try:
                    ray.init(address=self.address or "local", **options)
                except Exception as error:  # Ray raises this very class, among others
                    what = f"reach Ray at engine.address={self.address}" if self.address else "start Ray"
                    raise RunError(f"can't {what}: {' '.join(str(error).split())[:300]}") from error
            self._check_room(ray.nodes(), gpus)
            yield
        finally:
            ray.shutdown()
            if self.address is None:
                shutil.rmtree(folder, ignore_errors=True)
                if lock is not None:
                    os.close(lock)

    def _check_room(self, nodes: Sequence[Mapping[str, Any]], gpus: float) -> None:
        """Whether one of the cluster's nodes has room for a worker."""
        rooms = [(n["Resources"].get("CPU", 0), n["Resources"].get("GPU", 0)) for n in nodes if n["Alive"]]
        if not any(cores >= self.cpus and cards >= gpus for cores, cards in rooms):
            largest = " and ".join(f"{each:g}" for each in max(rooms))
            needs = f"engine.cpus and engine.gpus ask for {self.cpus} cores and {gpus:g} GPUs"
            raise RunError(f"no room for a worker: {needs}, a node of the cluster has {largest}")


def _short_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= LONGEST else "/tmp"


def _unreachable(address: str) -> str | None:
    """Why nothing listens at HOST:PORT, which Ray would go on trying for minutes; None if something does."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()) or "/" in host:
        return None
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            return None
    except (OSError, OverflowError) as error:
        return str(error) or type(error).__name__


def _own_folder(place: Path) -> tuple[str, int | None]:
    """A folder for a Ray of this run's own, and a lock on it; those that killed runs have left are removed first.

    Where folders can't be locked there is none, and nothing is removed.
    """
    for old in place.glob(f"{FOLDER}*") if fcntl is not None else ():
        try:
            if time.time() - old.stat().st_mtime > YOUNG:  # a younger one may be about to be locked
                os.close(_locked(old))
                shutil.rmtree(old, ignore_errors=True)
        except OSError:  # in use, gone meanwhile, or somebody else's
            continue
    folder = tempfile.mkdtemp(prefix=FOLDER, dir=place)
    try:
        return folder, None if fcntl is None else _locked(Path(folder))
    except OSError:
        return folder, None


def _locked(folder: Path) -> int:
    """A handle that holds the folder's lock for as long as this process lives; an `OSError` if another one has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        assert fcntl is not None
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put back what was to happen on Ctrl-C and SIGTERM: Ray has handlers of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
