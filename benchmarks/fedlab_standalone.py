"""Federated averaging by FedLab 1.3 (Zeng et al., JMLR 2023) in its standalone mode.

Its own loop (`StandalonePipeline.main`) with `SGDSerialClientTrainer`, one client after another on one model in place,
and `SyncServerHandler`; what the pipeline leaves to its users to override, `evaluate`, reads the clocks.

Where it differs from the others: clients weigh the same whatever their numbers of samples, and only parameters are
averaged; batch normalisation's running statistics stay in the trainer's model from client to client.
"""

from __future__ import annotations

from typing import Any

from engines import Clocks
from same_work import Rounds, Work
from torch.utils.data import DataLoader, TensorDataset


def rounds(config: dict[str, Any]) -> list[Clocks]:
    """The clocks at the end of each round."""
    from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
    from fedlab.contrib.algorithm.basic_server import SyncServerHandler
    from fedlab.contrib.dataset.basic_dataset import FedDataset
    from fedlab.core.standalone import StandalonePipeline

    work = Work.of(config)
    ended = Rounds(work)

    class Shares(FedDataset):  # type: ignore[misc]
        def get_dataloader(self, id: int, batch_size: int, type: str = "train") -> DataLoader[Any]:  # noqa: A002
            return DataLoader(TensorDataset(*work.clients[id]), batch_size=batch_size, shuffle=True)

    class Pipeline(StandalonePipeline):  # type: ignore[misc]
        def evaluate(self) -> None:
            ended.note(self.handler.model.state_dict())

    net, cuda = work.first(), work.world.device.type == "cuda"
    trainer = SGDSerialClientTrainer(net, len(work.clients), cuda=cuda)
    trainer.setup_dataset(Shares())
    trainer.setup_optim(work.plan["epochs"], work.plan["batch_size"], work.plan["lr"])
    Pipeline(SyncServerHandler(net, work.rounds, 1.0, cuda=cuda), trainer).main()
    return ended.ended
