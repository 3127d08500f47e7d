"""Federated averaging as Flower's PyTorch tutorial writes it, on the data and the network of an fl-sim configuration.

Only Flower's documented API: a ClientApp that builds its net, loads the weights, iterates a DataLoader and sends the
whole state dict back; FedAvg; the simulation engine on Ray. `FL_SIM_BENCHMARK` holds the composed configuration.
"""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from same_work import Work
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ENVIRONMENT = "FL_SIM_BENCHMARK"
ended: list[Any] = []
"""`engines.clocks()` at the end of each round."""


@cache
def work() -> Work:
    """Of the configuration that the environment holds, in each process."""
    return Work.of(json.loads(os.environ[ENVIRONMENT]))


@cache
def load_data(client: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """The client's samples, made once in a process."""
    return DataLoader(TensorDataset(*work().clients[client]), batch_size=work().plan["batch_size"], shuffle=True)


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    plan = work().plan
    model = work().net()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    batches = load_data(int(context.node_config["partition-id"]))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=plan["lr"])
    model.train()
    running = 0.0
    for _ in range(plan["epochs"]):
        for images, labels in batches:
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            running += loss.item()
    metrics = MetricRecord({"train_loss": running / len(batches), "num-examples": len(batches.dataset)})  # type: ignore[arg-type]
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    from engines import clocks

    plan = json.loads(os.environ[ENVIRONMENT])

    def note(round_: int, _arrays: ArrayRecord) -> None:
        if round_:
            ended.append(clocks())

    strategy = FedAvg(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=plan["clients"], min_available_nodes=plan["clients"]
    )
    strategy.start(grid, ArrayRecord(work().first().state_dict()), num_rounds=plan["rounds"], evaluate_fn=note)  # type: ignore[arg-type]
