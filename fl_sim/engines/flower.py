"""The one place that touches what Flower keeps private; tested against the pinned minor release."""

from __future__ import annotations

from flwr.app import Message
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1


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
