"""The one place that touches what Flower keeps private; tested against the pinned minor release."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1
POLL_SECONDS = 0.01


def identify(run_id: int) -> None:
    """Say who this process is; without it no Message can be made. Holds for the whole process."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE


def empty_run(run_id: int) -> Run:
    return Run.create_empty(run_id)


def set_message_id(message: Message, message_id: str) -> None:
    """Name a message, as the SuperLink would; a reply copies the name."""
    message.metadata.__dict__["_message_id"] = message_id


def set_reason(message: Message, reason: str) -> None:
    """Say in other words why there is only an error."""
    message.error.__dict__["_reason"] = reason


@dataclass(frozen=True)
class Simulation:
    """Flower's simulation engine at work in threads of this process, its workers elsewhere."""

    grid: Grid
    faults: SimpleQueue[BaseException] = field(repr=False)
    pools: Sequence[Any] = field(default=(), repr=False)
    """Flower's pools of Ray's workers."""

    def check(self) -> None:
        """Raise what the engine has stopped with, if it has."""
        if not self.faults.empty():
            raise self.faults.get()

    def end_clients(self) -> None:
        """End the workers that are at work; Ray starts them anew, and asks their clients once more."""
        end_busy(self.pools, restart=True)


def end_busy(pools: Sequence[Any], *, restart: bool) -> None:
    """End those of Ray's workers in which a client is training, or hangs: there is no gentler way."""
    import ray

    for pool in pools if ray.is_initialized() else ():
        for actor in list(pool._future_to_actor.values()):
            ray.kill(actor, no_restart=not restart)


@contextmanager
def simulation(
    client: Callable[[Message, Context], Message], nodes: int, resources: Mapping[str, float], run_id: int
) -> Iterator[Simulation]:
    """Flower's simulation engine with `nodes` nodes, each worker holding `resources`; Ray must be there already.

    Flower would run the ServerApp on a thread of its own, where no Ctrl-C arrives and no checkpoint can be shielded
    from one. So the ServerApp that Flower gets only hands its Grid over and waits until the caller has done with it.
    """
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.telemetry import EventType

    identify(run_id)
    run = empty_run(run_id)
    run.primary_task_id = run_id
    run.federation_id = NOOP_FEDERATION_ID
    grids: SimpleQueue[Grid] = SimpleQueue()
    faults: SimpleQueue[BaseException] = SimpleQueue()
    finished = threading.Event()
    server = ServerApp()

    @server.main()
    def lend(grid: Grid, _context: Context) -> None:
        grids.put(grid)
        finished.wait()

    def host() -> None:
        try:
            config: dict[str, Any] = {"client_resources": dict(resources)}
            _run_simulation(
                num_supernodes=nodes,
                exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
                # Flower only ever calls it: anything of a ClientApp's signature will do, and pickles smaller.
                client_app=client,  # type: ignore[arg-type]
                server_app=server,
                backend_config=config,
                run=run,
            )
        except BaseException as error:
            faults.put(error)
            finished.set()

    thread = threading.Thread(target=host, name="flower", daemon=True)
    with silenced("flwr"), workers_ending_with_ray() as pools:
        thread.start()
        try:
            yield _ready(grids, faults, nodes, pools)
        finally:
            finished.set()
            while thread.is_alive():  # Flower waits for every client that it has asked, for one that hangs too
                end_busy(pools, restart=False)
                thread.join(1.0)


def _ready(
    grids: SimpleQueue[Grid], faults: SimpleQueue[BaseException], nodes: int, pools: Sequence[Any]
) -> Simulation:
    """The simulation, as soon as all its nodes are there."""
    pause = threading.Event()
    while grids.empty() and faults.empty():
        pause.wait(POLL_SECONDS)
    if not faults.empty():
        raise faults.get()
    found = Simulation(grids.get(), faults, pools)
    while len(list(found.grid.get_node_ids())) < nodes:
        found.check()
        pause.wait(POLL_SECONDS)
    return found


@contextmanager
def workers_ending_with_ray() -> Iterator[list[Any]]:
    """Leave it to Ray to end the workers when the connection closes; gives the pools of workers as they are made.

    Flower calls each worker's `terminate`, which Ray takes for a task that died, tries again, and prints of.
    """
    from flwr.simulation.ray_transport import ray_actor

    pool: Any = ray_actor.BasicActorPool
    before, adding = pool.terminate_all_actors, pool.add_actors_to_pool
    pools: list[Any] = []

    def noted(self: Any, count: int) -> None:
        pools.append(self)
        adding(self, count)

    pool.terminate_all_actors, pool.add_actors_to_pool = lambda _self: None, noted
    try:
        yield pools
    finally:
        pool.terminate_all_actors, pool.add_actors_to_pool = before, adding


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """A logger that says nothing: what Flower logs of a failed client is in that client's reply, too."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
