"""fl-sim's values as Flower's records and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fl_sim.protocols import State

R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)


class TensorArray(Array):
    """A Flower Array that holds a tensor by reference and serialises it only when its bytes are read.

    In one process nothing is ever copied; anywhere else it reads, hashes and pickles as the plain Array it stands for.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.__dict__.update(
            tensor=tensor,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            stype="numpy.ndarray",
        )

    def __getattribute__(self, name: str) -> Any:
        if name == "data" and "data" not in object.__getattribute__(self, "__dict__"):
            plain = Array(object.__getattribute__(self, "tensor").detach().cpu().numpy())
            object.__getattribute__(self, "__dict__")["data"] = plain.data
        return super().__getattribute__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


# Flower writes the class's name into the object's header.
TensorArray.__qualname__ = "Array"


def record_of(content: RecordDict, name: str, kind: type[R]) -> R:
    """The record of that name and kind; `content.array_records` and its like would first copy all that it holds."""
    found = content[name]
    if not isinstance(found, kind):
        raise KeyError(name)
    return found


def to_tensor(array: Array, device: torch.device) -> Tensor:
    """An Array's tensor on the device: the very one it holds where it can be had, else a fresh one."""
    if isinstance(array, TensorArray):
        return cast(Tensor, array.tensor).to(device)
    return torch.from_numpy(np.array(array.numpy())).to(device)


def by_reference(arrays: Mapping[str, Array]) -> ArrayRecord:
    """A record of these very arrays; ArrayRecord's own constructor would serialise each into a plain new one."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = array
    return record


def pack(state: State) -> RecordDict:
    """A state as records: tensors in one, plain values in another."""
    tensors = {name: TensorArray(value) for name, value in state.items() if isinstance(value, Tensor)}
    plain: dict[str, Any] = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    return RecordDict({"tensors": by_reference(tensors), "plain": ConfigRecord(plain)})


def unpack(records: RecordDict, device: torch.device) -> State:
    """The state that `pack` packed; empty for a client that has remembered nothing."""
    if "tensors" not in records:
        return {}
    tensors = {name: to_tensor(array, device) for name, array in record_of(records, "tensors", ArrayRecord).items()}
    return tensors | cast(dict[str, Any], dict(record_of(records, "plain", ConfigRecord)))
