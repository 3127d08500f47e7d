"""What a tracker's program would show of a run: the points of its curves, read from the files it left."""

from __future__ import annotations

import importlib
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fl_sim.trackers.scalars import Scalar


def of_tensorboard(folder: Path) -> Iterator[Scalar]:
    reading = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = reading.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    for tag in found.Tags()["scalars"]:
        yield from (Scalar(tag, event.step, event.value) for event in found.Scalars(tag))


def of_wandb(folder: Path) -> Iterator[Scalar]:
    """A finished run's; the process that writes for wandb may be a moment behind."""
    [path] = (folder / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    while "exit" not in (kinds := [each.WhichOneof("record_type") for each in wandb_records(path)]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} does not end: {kinds}")
        time.sleep(0.1)
    for record in wandb_records(path):
        row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for tag, value in row.items():
            if "/" in tag:
                yield Scalar(tag, row["epoch"] if tag.startswith("central/") else row["round"], value)
        if record.WhichOneof("record_type") == "summary":
            last = {item.key: json.loads(item.value_json) for item in record.summary.update}
            yield from (Scalar(tag, 0, value) for tag, value in last.items() if tag.startswith("final/"))


def wandb_records(path: Path) -> Iterator[Any]:
    """LevelDB's log format: blocks of 32 KiB of pieces with a checksum, a length and a kind, after 7 bytes."""
    kinds = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(data):  # whole, or the last piece
            record = kinds.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def mlflow_run(folder: Path) -> tuple[Any, Any]:
    """The one run that the store above a run folder has of it, and a client that reads it."""
    [store] = [each / "mlflow.db" for each in folder.parents if (each / "mlflow.db").exists()]
    client = importlib.import_module("mlflow").MlflowClient(f"sqlite:///{store}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    [run] = [each for each in runs if each.data.tags["fl_sim.folder"] == str(folder)]
    return run, client


def of_mlflow(folder: Path) -> Iterator[Scalar]:
    run, client = mlflow_run(folder)
    for tag in run.data.metrics:
        yield from (Scalar(tag, each.step, each.value) for each in client.get_metric_history(run.info.run_id, tag))


READERS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": of_mlflow}
