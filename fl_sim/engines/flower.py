"""The one place that touches what Flower keeps private; tested against the pinned minor release."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from flwr.app import Context, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

GONE = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
"""Errors with which a SuperLink answers in place of a node that it hears nothing more of."""
SERVER_NODE = 1
POLL_SECONDS = 0.01
STARTING = 10
"""Timeouts that a worker may miss before its first answer."""


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


@dataclass
class Workers:
    """Ray's workers in Flower's pools, as far as one must know them to end those in which a client hangs."""

    pools: list[Any] = field(default_factory=list)
    answered: set[int] = field(default_factory=set)
    """Those that have answered since they were started: until then a worker may be starting still."""
    missed: Counter[int] = field(default_factory=Counter)

    def give_up(self) -> None:
        """End the workers that should have answered by now; Ray starts them anew, and asks their clients once more.

        One that has never answered is given time to start, or it would never come to an answer.
        """
        for actor in self._busy():
            self.missed[id(actor)] += 1
            if id(actor) in self.answered or self.missed[id(actor)] >= STARTING:
                self._end(actor, restart=True)

    def end(self) -> None:
        """End the workers that are at work; there is no gentler way."""
        for actor in self._busy():
            self._end(actor, restart=False)

    def note(self, actor: Any) -> None:
        """A worker has answered."""
        self.answered.add(id(actor))
        self.missed.pop(id(actor), None)

    def _busy(self) -> list[Any]:
        import ray

        # Without the check, Ray's functions would start a Ray of their own.
        return [actor for pool in self.pools for actor in list(pool._future_to_actor.values()) if ray.is_initialized()]

    def _end(self, actor: Any, *, restart: bool) -> None:
        import ray

        ray.kill(actor, no_restart=not restart)
        self.answered.discard(id(actor))
        self.missed.pop(id(actor), None)


@dataclass(frozen=True)
class Simulation:
    """Flower's simulation engine at work in threads of this process, its workers elsewhere."""

    grid: Grid
    faults: SimpleQueue[BaseException] = field(repr=False)
    workers: Workers

    def check(self) -> None:
        """Raise what the engine has stopped with, if it has."""
        if not self.faults.empty():
            raise self.faults.get()


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
    with silenced("flwr"), workers_ending_with_ray() as workers:
        thread.start()
        try:
            yield _ready(grids, faults, nodes, workers)
        finally:
            finished.set()
            while thread.is_alive():  # Flower waits for every client that it has asked, for one that hangs too
                workers.end()
                thread.join(1.0)


def _ready(grids: SimpleQueue[Grid], faults: SimpleQueue[BaseException], nodes: int, workers: Workers) -> Simulation:
    """The simulation, as soon as all its nodes are there."""
    pause = threading.Event()
    while grids.empty() and faults.empty():
        pause.wait(POLL_SECONDS)
    if not faults.empty():
        raise faults.get()
    found = Simulation(grids.get(), faults, workers)
    while len(list(found.grid.get_node_ids())) < nodes:
        found.check()
        pause.wait(POLL_SECONDS)
    return found


@contextmanager
def workers_ending_with_ray() -> Iterator[Workers]:
    """Leave it to Ray to end the workers when the connection closes; gives the workers as they come.

    Flower calls each worker's `terminate`, which Ray takes for a task that died, tries again, and prints of.
    """
    from flwr.simulation.ray_transport import ray_actor

    pool: Any = ray_actor.BasicActorPool
    before = pool.terminate_all_actors, pool.add_actors_to_pool, pool.fetch_result_and_return_actor_to_pool
    workers = Workers()

    def added(self: Any, count: int) -> None:
        workers.pools.append(self)
        before[1](self, count)

    def fetched(self: Any, future: Any) -> Any:
        actor = self._future_to_actor[future]
        result = before[2](self, future)
        workers.note(actor)
        return result

    pool.terminate_all_actors = lambda _self: None
    pool.add_actors_to_pool, pool.fetch_result_and_return_actor_to_pool = added, fetched
    try:
        yield workers
    finally:
        pool.terminate_all_actors, pool.add_actors_to_pool, pool.fetch_result_and_return_actor_to_pool = before


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
