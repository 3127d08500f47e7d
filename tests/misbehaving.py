"""A ClientApp whose clients misbehave in round 2, each in its own way, as clients of other people's making might."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.app import train as honest
from fl_sim.engines.records import TensorArray, by_reference, to_tensor

Replace = Callable[[RecordDict], Any]


def with_delta(change: Callable[[torch.Tensor], torch.Tensor]) -> Replace:
    """Another update in place of the honest one."""

    def replace(content: RecordDict) -> None:
        delta = to_tensor(content.array_records["update"]["delta"], torch.device("cpu"))
        content["update"] = by_reference({"delta": TensorArray(change(delta))})

    return replace


def poked(value: float) -> Replace:
    def change(delta: torch.Tensor) -> torch.Tensor:
        spoilt = delta.clone()
        spoilt[-1] = value
        return spoilt

    return with_delta(change)


def under(*names: str) -> Replace:
    """The arrays are called otherwise."""

    def replace(content: RecordDict) -> None:
        array = content.array_records["update"]["delta"]
        content["update"] = by_reference(dict.fromkeys(names, array))

    return replace


def saying(**header: Any) -> Replace:
    def replace(content: RecordDict) -> None:
        content["client"] = ConfigRecord(dict(content.config_records["client"]) | header)

    return replace


def without(*names: str) -> Replace:
    def replace(content: RecordDict) -> None:
        for name in names or list(content):
            del content[name]

    return replace


def damaged(content: RecordDict) -> None:
    """Bytes that are no array."""
    array = Array(np.zeros(3, np.float32))
    content["update"] = ArrayRecord({"delta": Array(array.dtype, array.shape, array.stype, b"garbage")})


def metrics(**values: Any) -> Replace:
    def replace(content: RecordDict) -> None:
        content["metrics"] = MetricRecord(values)

    return replace


KINDS: dict[str, tuple[str, Replace]] = {
    "NaN": ("not_finite", poked(float("nan"))),
    "infinity": ("not_finite", poked(float("-inf"))),
    "a huge norm": ("too_long", with_delta(lambda delta: delta * 0 + 1e18)),
    "a norm whose square overflows": ("too_long", with_delta(lambda delta: delta * 0 - 3e38)),
    "too short": ("wrong_shape", with_delta(lambda delta: delta[1:])),
    "too long": ("wrong_shape", with_delta(lambda delta: torch.cat([delta, delta]))),
    "a matrix": ("wrong_shape", with_delta(lambda delta: delta[None])),
    "nothing in it": ("wrong_shape", with_delta(lambda delta: delta[:0])),
    "double precision": ("wrong_dtype", with_delta(torch.Tensor.double)),
    "whole numbers": ("wrong_dtype", with_delta(torch.Tensor.long)),
    "complex numbers": ("wrong_dtype", with_delta(lambda delta: delta.to(torch.complex64))),
    "another name": ("wrong_name", under("weights")),
    "a second name": ("wrong_name", under("delta", "more")),
    "no name": ("wrong_name", under()),
    "someone else's id": ("wrong_client", saying(id=3)),
    "no such id": ("wrong_client", saying(id=-1)),
    "a stale round": ("stale", saying(round=1)),
    "a round to come": ("stale", saying(round=3)),
    "another attempt": ("stale", saying(attempt=1)),
    "nothing at all": ("empty", without()),
    "no update": ("malformed", without("update")),
    "no metrics": ("malformed", without("metrics")),
    "no header": ("malformed", without("client")),
    "a header of words": ("malformed", saying(round="two")),
    "a loss of many": ("malformed", metrics(loss=[1.0, 2.0])),
    "no loss": ("malformed", metrics(**{"num-examples": 3})),
    "bytes that are no array": ("malformed", damaged),
}
"""What a client answers with, what it is refused for, and how it makes it of the honest answer."""
RAISING: dict[str, Callable[[Message], Any]] = {
    "an error": lambda message: 1 / 0,
    "an exit": lambda message: sys.exit(3),
    "no reply": lambda message: None,
    "a reply that is none": lambda message: "done",
}
"""What counts as raised."""
NAMES = [*RAISING, *KINDS]

app, raising, hanging = ClientApp(), ClientApp(), ClientApp()


def order(message: Message) -> tuple[int, int]:
    """Round and client."""
    said = message.content.config_records["order"]
    return int(said["round"]), int(said["client"])  # type: ignore[arg-type]


@app.train()
def train_and_misbehave(message: Message, context: Context) -> Message:
    """fl-sim's own, but in round 2 client i does the i-th thing of the list; those after the last are honest."""
    round_, client = order(message)
    if round_ != 2 or client >= len(NAMES):
        return honest(message, context)
    name = NAMES[client]
    if name in RAISING:
        answer: Message = RAISING[name](message)
        return answer
    reply = honest(message, context)
    KINDS[name][1](reply.content)
    return reply


@raising.train()
def train_or_raise(message: Message, context: Context) -> Message:
    """The control: those who misbehave there raise here."""
    round_, client = order(message)
    if round_ == 2 and client < len(NAMES):
        raise ValueError("no")
    return honest(message, context)


@hanging.train()
def train_or_hang(message: Message, context: Context) -> Message:
    """fl-sim's own, but in round 2 client 0 never comes to an end."""
    if order(message) == (2, 0):
        time.sleep(10_000)
    return honest(message, context)
