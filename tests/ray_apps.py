"""Client apps for the tests of engines that run them in processes of their own, and messages to ask them with."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from clients.app import train as honest
from fl_sim.engines.records import pack, unpack

MARK = "FL_SIM_TEST_MARK"
"""Names the environment variable with the file that says that a process has been killed already."""


def asked(grid: Grid, *numbers: int) -> list[Message]:
    """One train message for each number, to the nodes in order."""
    return [
        Message(RecordDict({"ask": ConfigRecord({"number": number})}), dst_node_id=node, message_type="train")
        for number, node in zip(numbers, grid.get_node_ids(), strict=False)
    ]


def remember(message: Message, context: Context) -> Message:
    """Adds the number to what it remembers and replies with the sum; 0 leaves it alone, a negative one fails."""
    assert context.run_config == {"config": "text"}
    number = int(message.content.config_records["ask"]["number"])  # type: ignore[arg-type]
    total = int(unpack(context.state, torch.device("cpu")).get("sum", 0)) + number  # type: ignore[arg-type]
    if number:
        context.state = pack({"sum": total})
    if number < 0:
        raise ValueError("negative")
    return Message(RecordDict({"sum": MetricRecord({"value": total})}), reply_to=message)


def sums(replies: Sequence[Message]) -> list[int]:
    return [int(reply.content.metric_records["sum"]["value"]) for reply in replies]  # type: ignore[arg-type]


def _order(message: Message) -> tuple[int, int]:
    order = message.content.config_records["order"]
    return int(order["round"]), int(order["client"])  # type: ignore[arg-type]


failing = ClientApp()


@failing.train()
def train_or_fail(message: Message, context: Context) -> Message:
    """fl-sim's own, but clients with odd numbers fail in round 2."""
    round_, client = _order(message)
    if round_ == 2 and client % 2:
        raise ValueError(f"client {client} does not like this round")
    return honest(message, context)


killed_once = ClientApp()


@killed_once.train()
def train_or_die(message: Message, context: Context) -> Message:
    """fl-sim's own, but the first process that is asked in round 2 is killed."""
    mark = Path(os.environ[MARK])
    if _order(message)[0] == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(message, context)


deadly = ClientApp()


@deadly.train()
def train_and_die(message: Message, context: Context) -> Message:
    """fl-sim's own, but in round 2 client after client kills the process that serves it."""
    if _order(message)[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(message, context)
