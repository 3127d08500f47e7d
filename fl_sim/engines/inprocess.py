"""The default engine: Flower's ServerApp and ClientApp in this process, arrays passed by reference."""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, cast

import torch
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from fl_sim.captured import Captured
from fl_sim.engines.flower import empty_run, identify, set_message_id
from fl_sim.engines.numerics import serving
from fl_sim.engines.records import pack, unpack
from fl_sim.errors import ConfigError, require
from fl_sim.models.classifier import Compute, Precision
from fl_sim.protocols import State
from fl_sim.together.meeting import stand_in

RUN_ID = 1
FIRST_NODE = 2  # 1 is the server
SERVER_APP, CLIENT_APP = "server.app:app", "clients.app:app"
CLIENT_ERROR = 1  # Flower's code for "the ClientApp raised"


class InProcessGrid(Grid):
    """Calls the ClientApp on `workers` threads; node `FIRST_NODE + i` serves client i."""

    def __init__(
        self, app: ClientApp, nodes: int, run_config: Mapping[str, str], workers: int, capture: bool = False
    ) -> None:
        identify(RUN_ID)
        self._app = app
        self._nodes = range(FIRST_NODE, FIRST_NODE + nodes)
        self._run_config = dict(run_config)
        self._states: dict[int, RecordDict] = {}
        self._changed: set[int] = set()
        self._sent = 0
        self._replies: dict[str, Message] = {}
        self._pool = ThreadPoolExecutor(workers, "client", initializer=_begin, initargs=(capture,))

    def set_run(self, run: Run) -> None:
        """Nothing to set: this grid lives for one run."""

    @property
    def run(self) -> Run:
        return empty_run(RUN_ID)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        replies = self.send_and_receive(messages)
        self._replies.update((reply.metadata.reply_to_message_id, reply) for reply in replies)
        return [reply.metadata.reply_to_message_id for reply in replies]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies in the messages' order; clients run side by side, one torch thread each."""
        futures = [self._pool.submit(self._deliver, self._named(message)) for message in messages]
        wait(futures, return_when=FIRST_EXCEPTION)  # waking for each of them would take the interpreter from a client
        return [future.result() for future in futures]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def private_states(self) -> dict[int, State]:
        """What clients have remembered since the last call, by client."""
        changed, self._changed = self._changed, set()
        return {node - FIRST_NODE: unpack(self._states[node], torch.device("cpu")) for node in sorted(changed)}

    def restore(self, states: Mapping[int, State]) -> None:
        """Give clients back what they remembered in an interrupted run."""
        self._states = {client + FIRST_NODE: pack(state) for client, state in states.items()}

    def _named(self, message: Message) -> Message:
        self._sent += 1
        set_message_id(message, str(self._sent))
        return message

    def _deliver(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        known = self._states.get(node)
        # The app works on a copy, so that one that fails half-way leaves its state as it was.
        state = RecordDict() if known is None else copied(known)
        context = Context(RUN_ID, node, {}, state, dict(self._run_config))
        try:
            reply = a_reply(self._app(message, context))
        except (Exception, SystemExit) as error:
            reply = failed(error, message)
        else:
            if len(context.state) if known is None else not same(context.state, known):
                self._states[node] = context.state
                self._changed.add(node)
        self._sent += 1
        set_message_id(reply, str(self._sent))
        return reply


def _begin(capture: bool) -> None:
    """What a thread that runs clients does first."""
    torch.set_num_threads(1)
    if capture:
        stand_in(Captured())


def a_reply(answer: object) -> Message:
    """What a ClientApp returned, if it is a reply: a client that returns something else has failed."""
    if not isinstance(answer, Message):
        raise TypeError(f"the ClientApp returned {type(answer).__name__}, not a Message")
    return answer


def failed(error: BaseException, message: Message) -> Message:
    """The reply of a client that raised: its first line says what, the rest where."""
    reason = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    return Message(Error(CLIENT_ERROR, reason), reply_to=message)


def copied(records: RecordDict) -> RecordDict:
    """Records whose entries can be replaced without touching the originals; the arrays themselves are shared."""
    return RecordDict({name: r.copy() if isinstance(r, ArrayRecord) else deepcopy(r) for name, r in records.items()})


def same(left: RecordDict, right: RecordDict) -> bool:
    """Whether two states hold the very same arrays and equal values; reads no array's bytes."""
    return left.keys() == right.keys() and all(_alike(left[name], right[name]) for name in left)


def _alike(left: object, right: object) -> bool:
    if isinstance(left, ArrayRecord) and isinstance(right, ArrayRecord):
        return list(left) == list(right) and all(left[name] is right[name] for name in left)
    return type(left) is type(right) and left == right


def load_app(reference: str) -> object:
    """The object that `module:name` names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def check_apps(server_app: str, client_app: str) -> None:
    """Whether apps other than fl-sim's own are there, and are apps."""
    for key, reference, own, kind in (
        ("server_app", server_app, SERVER_APP, ServerApp),
        ("client_app", client_app, CLIENT_APP, ClientApp),
    ):
        if reference == own:  # which would import all of it
            continue
        wanted = f"must name a {kind.__name__} as module:name"
        try:
            usable = isinstance(load_app(reference), kind)
        except Exception as error:  # whatever a user's module does on import
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(key, reference, f"{wanted} ({reason})") from error
        require(usable, key, reference, wanted)


@dataclass(frozen=True)
class InProcess:
    """Runs the apps in this process, clients on `workers` threads of one torch thread each.

    `server_threads` are torch's threads for erasing, aggregation and evaluation. Results depend on them, as any
    float32 sum depends on its order, but not on `workers`. `deterministic=false` lets a GPU choose its fastest
    algorithms, whose results differ in their last bits from run to run. `capture` replays a client's training steps
    on a GPU as CUDA graphs, see `fl_sim.captured`.
    """

    workers: int | Literal["auto"] = "auto"
    server_threads: int = 1
    precision: Precision = "float32"
    channels_last: bool = True
    deterministic: bool = True
    capture: bool = False
    server_app: str = SERVER_APP
    client_app: str = CLIENT_APP

    def __post_init__(self) -> None:
        usable = self.workers == "auto" or 1 <= self.workers <= 256
        require(usable, "workers", self.workers, "must be auto or from 1 to 256 threads")
        require(1 <= self.server_threads <= 256, "server_threads", self.server_threads, "must be from 1 to 256 threads")
        alone = not self.capture or self.workers in ("auto", 1)
        require(alone, "workers", self.workers, "must be auto or 1 with engine.capture: graphs are one thread's work")
        check_apps(self.server_app, self.client_app)

    @property
    def compute(self) -> Compute:
        return Compute(self.precision, self.channels_last)

    def computing(self) -> AbstractContextManager[None]:
        """As the server computes: its threads, and a GPU's switches."""
        return serving(self.server_threads, self.precision, self.deterministic)

    def run(self, run_config: Mapping[str, str], clients: int, device: torch.device) -> None:
        """Execute one run, from its first round or from its checkpoint on."""
        server = cast(ServerApp, load_app(self.server_app))
        client = cast(ClientApp, load_app(self.client_app))
        grid = self.grid(client, clients, run_config, self._worker_count(device))
        try:
            with self.computing():
                server(grid, Context(RUN_ID, 1, {}, RecordDict(), dict(run_config)))
        finally:
            grid.close()

    def grid(self, app: ClientApp, nodes: int, run_config: Mapping[str, str], workers: int) -> InProcessGrid:
        return InProcessGrid(app, nodes, run_config, workers, self.capture)

    def _worker_count(self, device: torch.device) -> int:
        if self.workers != "auto":
            return self.workers
        return 1 if device.type != "cpu" else available_cores()


def available_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
