"""What a client's reply must say and hold, and what is wrong with one that doesn't."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from torch import Tensor

from fl_sim.acceptance import Reason, Refusal, fault_in, to_another
from fl_sim.engines.flower import GONE
from fl_sim.engines.records import record_of, to_tensor, unpack
from fl_sim.protocols import Update

Header = tuple[int, int, int]
"""Client, round and attempt: which order a reply answers."""


def header(client: int, round_: int, attempt: int) -> ConfigRecord:
    """What a reply begins with."""
    return ConfigRecord({"id": client, "round": round_, "attempt": attempt})


def read_replies(
    replies: Iterable[Message], asked: Sequence[Header], client_at: Mapping[int, int], vector: Tensor
) -> tuple[dict[int, Update], list[Refusal]]:
    """The sound updates by client, and what was wrong with the other replies; nothing that they hold raises."""
    waiting = {order[0]: order for order in asked}
    updates: dict[int, Update] = {}
    refusals: list[Refusal] = []
    answered = set[int]()
    for reply in replies:
        if reply.has_error() and reply.error.code in GONE:  # said by the SuperLink: the node itself says nothing
            continue
        node = reply.metadata.src_node_id
        client = client_at.get(node)
        if client not in waiting:
            refusals.append(Refusal(client, "wrong_client", f"node {node} answers, which was not asked"))
            continue
        wrong = _misaddressed(reply, waiting[client])
        if wrong is None and client in answered:
            wrong = "duplicate", "the client has answered already"
        elif wrong is None:
            answered.add(client)
            update = _read(reply, vector)
            if isinstance(update, Update):
                updates[client] = update
            else:
                wrong = update
        if wrong is not None:
            refusals.append(Refusal(client, *wrong))
    heard = updates.keys() | {refusal.client for refusal in refusals}
    refusals += [Refusal(client, "no_reply", "there was no reply") for client in waiting if client not in heard]
    return updates, refusals


def _misaddressed(reply: Message, order: Header) -> tuple[Reason, str] | None:
    """Whether a reply says that it answers something else than what its sender was asked."""
    if reply.has_error():  # Flower made it: it answers what was asked
        return None
    if not reply.content:
        return "empty", "the reply holds nothing"
    try:
        said = record_of(reply.content, "client", ConfigRecord)
        client, round_, attempt = (int(said[key]) for key in ("id", "round", "attempt"))  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        return "malformed", f"the reply does not say what it answers ({_said(error)})"
    if client != order[0]:
        return "wrong_client", f"the reply says that it comes from client {client}"
    if (round_, attempt) != order[1:]:
        return "stale", to_another((round_, attempt), order[1:])
    return None


def _read(reply: Message, vector: Tensor) -> Update | tuple[Reason, str]:
    if reply.has_error():
        return "raised", reply.error.reason or f"error {reply.error.code}"
    try:
        arrays = record_of(reply.content, "update", ArrayRecord)
        if list(arrays) != ["delta"]:
            return "wrong_name", f"the update holds {', '.join(map(str, arrays)) or 'nothing'}; it must hold delta"
        delta = to_tensor(arrays["delta"], vector.device)
        metrics = record_of(reply.content, "metrics", MetricRecord)
        update = Update(
            delta=delta,
            samples=int(metrics["num-examples"]),  # type: ignore[arg-type]
            loss=float(metrics["loss"]),  # type: ignore[arg-type]
            record=unpack(reply.content, vector.device) or None,
            accuracy=float(metrics["accuracy"]) if "accuracy" in metrics else None,  # type: ignore[arg-type]
        )
    except Exception as error:  # a client may send anything, and none of it must end the run
        return "malformed", f"the reply can't be read ({_said(error)})"
    return fault_in(delta, vector) or update


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
