"""Federated averaging by BlazeFL 2 (Azuma), with the handler and the trainers that it ships in `contrib`.

One worker: `FedAvgBaseClientTrainer`, one client after another on one model in place; more:
`FedAvgThreadPoolClientTrainer`, the mode that its documentation recommends, a thread and a fresh model for each client.
The loop is that of its quickstart, for BlazeFL leaves it to its users, without the evaluation. The same weights, and
the whole state dict averaged. It needs Python 3.12; its threads run Python in parallel only on a free-threaded build.
"""

from __future__ import annotations

from typing import Any

from engines import Clocks
from same_work import Rounds, Work
from torch import Generator, nn
from torch.utils.data import DataLoader, TensorDataset


class Nets:
    """A ModelSelector of one model: the server's with the first weights, clients' to be loaded."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def select_model(self, model_name: str) -> nn.Module:
        return self.work.first() if model_name == "first" else self.work.net()


class Shares:
    """A PartitionedDataset of the clients' tensors."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def get_dataloader(
        self, type_: str, cid: int, batch_size: int | None, generator: Generator | None
    ) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.work.clients[cid]), batch_size, shuffle=True, generator=generator)


def rounds(config: dict[str, Any]) -> list[Clocks]:
    """The clocks at the end of each round."""
    from blazefl.contrib.fedavg import FedAvgBaseClientTrainer, FedAvgBaseServerHandler, FedAvgThreadPoolClientTrainer

    work = Work.of(config)
    plan, number, device = work.plan, len(work.clients), work.world.device.type
    given = {"model_selector": Nets(work), "dataset": Shares(work), "device": device, "seed": 0}
    given |= {"num_clients": number, "batch_size": plan["batch_size"]}
    handler = FedAvgBaseServerHandler(**given, model_name="first", global_round=work.rounds, sample_ratio=1.0)
    given |= {"model_name": "client", "epochs": plan["epochs"], "lr": plan["lr"]}
    trainer = (
        FedAvgBaseClientTrainer(**given)
        if work.workers == 1
        else FedAvgThreadPoolClientTrainer(**given, num_parallels=work.workers)
    )
    ended = Rounds(work)
    while not handler.if_stop():
        sampled_clients = handler.sample_clients()
        broadcast = handler.downlink_package()
        trainer.local_process(broadcast, sampled_clients)
        for pack in trainer.uplink_package():
            handler.load(pack)
        ended.note(handler.model.state_dict())
    return ended.ended
