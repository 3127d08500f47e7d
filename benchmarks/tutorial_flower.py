"""Federated averaging by a client as Flower's PyTorch quickstart (1.41) writes it, data pipeline and all.

In every call: a fresh net, `load_partition`, `train_test_split(test_size=0.2, seed=42)`, `with_transform` with
torchvision's ToTensor and Normalize for each image, a DataLoader, SGD, `loss.item()` for each batch and the whole state
dict sent back. `stock_flower.py` keeps each client's samples as tensors instead.

Where it differs from the quickstart: local data go to the partitioner itself, as Flower Datasets' guide to local data
has it, for there is nothing to download; SGD's momentum is what the others have (none); nothing is evaluated. The split
keeps four fifths of a partition: each is padded with samples of its own so that exactly the client's samples are
trained on, and as many. Only for IID clients, whose numbers of samples differ by one at most.
"""

from __future__ import annotations

import json
import logging
import math
import os
from functools import cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from engines import Clocks
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from flwr_datasets.partitioner import IidPartitioner
from PIL.Image import fromarray
from same_work import Rounds, Work
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, ToTensor

from fl_sim.build import to_text
from fl_sim.samples import to_pixels

ENVIRONMENT = "FL_SIM_BENCHMARK"
TEST_SIZE, SEED = 0.2, 42
rounds_: list[Rounds] = []
partitioner: IidPartitioner | None = None  # the quickstart, too, makes it once in a process


@cache
def work() -> Work:
    """Of the configuration that the environment holds, in each process."""
    return Work.of(json.loads(os.environ[ENVIRONMENT]))


@cache
def pytorch_transforms() -> Compose:
    facts = work().world.parts.data.facts
    return Compose([ToTensor(), Normalize(facts.mean, facts.std)])


# What the quickstart has a user write ---------------------------------------------------------------------------------


def apply_transforms(batch: dict[str, Any]) -> dict[str, Any]:
    transforms = pytorch_transforms()
    batch["img"] = [transforms(img) for img in batch["img"]]
    return batch


def load_data(partition_id: int, num_partitions: int, batch_size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    global partitioner
    if partitioner is None:
        partitioner = IidPartitioner(num_partitions=num_partitions)
        partitioner.dataset = local_dataset(work())
    partition = partitioner.load_partition(partition_id)
    partition_train_test = partition.train_test_split(test_size=TEST_SIZE, seed=SEED)
    partition_train_test = partition_train_test.with_transform(apply_transforms)
    trainloader = DataLoader(partition_train_test["train"], batch_size=batch_size, shuffle=True)
    testloader = DataLoader(partition_train_test["test"], batch_size=batch_size)
    return trainloader, testloader


def train_net(net: nn.Module, trainloader: DataLoader[Any], epochs: int, lr: float, device: torch.device) -> float:
    net.to(device)
    criterion = nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    running_loss = 0.0
    for _ in range(epochs):
        for batch in trainloader:
            images = batch["img"].to(device)
            labels = batch["label"].to(device)
            optimizer.zero_grad()
            loss = criterion(net(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / (epochs * len(trainloader))


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    plan = work().plan
    model = work().net(normalised=True)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    partition, partitions = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    trainloader, _ = load_data(partition, partitions, plan["batch_size"])
    loss = train_net(model, trainloader, plan["epochs"], plan["lr"], work().world.device)
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(trainloader.dataset)})  # type: ignore[arg-type]
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    each = Rounds(work())
    rounds_.append(each)

    def note(round_: int, arrays: ArrayRecord) -> None:
        if round_:
            each.note(arrays.to_torch_state_dict())

    clients = each.work.config["clients"]
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    start = ArrayRecord(each.work.first(normalised=True).state_dict())
    strategy.start(grid, start, num_rounds=each.work.rounds, evaluate_fn=note)


# The same samples for it ----------------------------------------------------------------------------------------------


def local_dataset(work: Work) -> Dataset:
    """All clients' images as PNG, the largest clients first, as the partitioner cuts them."""
    world = work.world
    shares = sorted(world.shares, key=len, reverse=True)
    rows = next(n for n in range(2 * len(shares[0]) + 2) if n - math.ceil(TEST_SIZE * n) == len(shares[0]))
    chosen = np.concatenate([padded(share, rows - (len(share) < len(shares[0]))) for share in shares])
    pixels = to_pixels(world.train.images[torch.from_numpy(chosen)]).mul(255).round().byte().permute(0, 2, 3, 1)
    images = [fromarray(image.squeeze(-1).cpu().numpy()) for image in pixels]
    features = Features({"img": Image(), "label": Value("int64")})
    return Dataset.from_dict({"img": images, "label": world.train.labels[chosen].tolist()}, features=features)


def padded(share: np.ndarray[Any, Any], rows: int) -> np.ndarray[Any, Any]:
    """`rows` samples of which the tutorial's split puts the share's into the training part, and repeats elsewhere."""
    split = Dataset.from_dict({"row": list(range(rows))}).train_test_split(test_size=TEST_SIZE, seed=SEED)
    trained = split["train"]["row"]
    if len(trained) != len(share):
        raise SystemExit("partition: the tutorial's pipeline is compared for IID clients only")
    block = np.resize(share, rows)
    block[np.asarray(trained)] = share
    return block


def federate(server: ServerApp, client: ClientApp, config: dict[str, Any]) -> None:
    """Flower's simulation, with as many clients at a time as there are workers."""
    os.environ[ENVIRONMENT] = to_text(config)
    resources = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": work().workers, "num_gpus": 0},
    }
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(server, client, config["clients"], backend_config=resources)


def rounds(config: dict[str, Any]) -> list[Clocks]:
    """The clocks at the end of each round."""
    federate(server_app, client_app, config)
    return rounds_[-1].ended
