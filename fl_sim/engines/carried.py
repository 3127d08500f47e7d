"""Clients that remember, on workers that don't: what a client remembers travels with its order and its reply."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fl_sim.engines.flower import POLL_SECONDS, set_reason
from fl_sim.engines.inprocess import a_reply, copied, failed, same
from fl_sim.engines.records import pack, unpack
from fl_sim.protocols import State

PREFIX = "remembered:"
"""Begins the names of the records that hold a client's state."""

EXPIRES = "expires"
"""Names the record that says until when a message is of any use."""
LAPSED = "the order came to a worker when its round was over"

DIED = "<class 'ray.exceptions."
"""How the reason of an error reply begins that Flower's engine wrote because a worker had died."""
DEATH = "WorkerDied: a worker process died under it, and when it was tried again (out of memory, or killed)"

ClientFunction = Callable[[Message, Context], Message]


def put_state(content: RecordDict, state: RecordDict) -> None:
    """Add a client's state to what a message says."""
    content.update({PREFIX + name: record for name, record in state.items()})


def take_state(content: RecordDict) -> RecordDict:
    """Take a client's state out of what a message says; empty if there is none."""
    names = [name for name in content if name.startswith(PREFIX)]
    return RecordDict({name.removeprefix(PREFIX): content.pop(name) for name in names})


def call_with_state(app: ClientFunction, message: Message, run_config: Mapping[str, str], context: Context) -> Message:
    """Call a ClientApp with the state that came with its message; the reply carries it back if it has changed.

    An exception becomes an error reply, which carries none: the state counts successes only.
    """
    expires = message.content.pop(EXPIRES, None)
    if isinstance(expires, ConfigRecord) and time.time() > float(expires["at"]):  # type: ignore[arg-type]
        return failed(TimeoutError(LAPSED), message)
    known = take_state(message.content)
    own = Context(context.run_id, context.node_id, context.node_config, copied(known), dict(run_config))
    try:
        reply = a_reply(app(message, own))
    except (Exception, SystemExit) as error:
        return failed(error, message)
    if reply.has_content() and not same(own.state, known):
        put_state(reply.content, own.state)
    return reply


class CarryingGrid(Grid):
    """A Flower Grid whose nodes forget: keeps its clients' states here, and sends each along with its orders."""

    def __init__(self, grid: Grid, check: Callable[[], None], give_up: Callable[[], None] = lambda: None) -> None:
        self._grid = grid
        self._check = check
        self._give_up = give_up
        self._clients = {node: client for client, node in enumerate(sorted(grid.get_node_ids()))}
        self._states: dict[int, RecordDict] = {}
        self._changed: set[int] = set()

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self._clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        for message in sent:
            put_state(message.content, self._states.get(self._clients[message.metadata.dst_node_id], RecordDict()))
        return list(self._grid.push_messages(sent))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._received(reply) for reply in self._grid.pull_messages(list(message_ids))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies in the messages' order; those that have not come in `timeout` seconds are left out.

        What they have begun is given up, and orders that wait for a worker lapse: the next round would wait for both.
        """
        sent = list(messages)
        if timeout is not None:
            for message in sent:
                message.content[EXPIRES] = ConfigRecord({"at": time.time() + timeout})
        asked = list(self.push_messages(sent))
        until = time.monotonic() + (float("inf") if timeout is None else timeout)
        replies: dict[str, Message] = {}
        while len(replies) < len(asked) and time.monotonic() < until:
            self._check()
            waiting = [name for name in asked if name not in replies]
            pulled = {reply.metadata.reply_to_message_id: reply for reply in self.pull_messages(waiting)}
            replies |= pulled
            if not pulled:
                time.sleep(POLL_SECONDS)
        if len(replies) < len(asked):
            self._give_up()
        found = [replies[name] for name in asked if name in replies]
        return [reply for reply in found if not (reply.has_error() and LAPSED in (reply.error.reason or ""))]

    def private_states(self) -> dict[int, State]:
        """What clients have remembered since the last call, by client."""
        changed, self._changed = self._changed, set()
        return {client: unpack(self._states[client], torch.device("cpu")) for client in sorted(changed)}

    def restore(self, states: Mapping[int, State]) -> None:
        """Give clients back what they remembered in an interrupted run."""
        self._states = {client: pack(state) for client, state in states.items()}

    def _received(self, reply: Message) -> Message:
        if reply.has_error():
            if (reply.error.reason or "").startswith(DIED):
                set_reason(reply, f"{DEATH}\n{reply.error.reason}")
            return reply
        state = take_state(reply.content)
        if state:
            client = self._clients[reply.metadata.src_node_id]
            self._states[client] = state
            self._changed.add(client)
        return reply
