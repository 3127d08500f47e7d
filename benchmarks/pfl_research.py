"""Federated averaging by Apple's pfl (pfl-research; Granqvist et al. 2024), as its PyTorch tutorials write it.

Its own loop (`FederatedAveraging.run`) in one process, one client after another on one model in place. Users sample
themselves into the cohort in turn, so that each takes part in every round, weighted by the number of samples.

Where it differs from the others: only parameters are averaged; batch normalisation's running statistics stay in the
model from client to client. pfl takes a user's batches in their order: they are shuffled here when the user's dataset
is made, as others do for each epoch. The first round evaluates all users before and after, which can't be turned off.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from engines import Clocks
from same_work import Rounds, Work
from torch import Tensor, nn
from torch.nn import functional as F


class Learner(nn.Module):
    """A network with the two methods that pfl asks for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        self.train()
        return F.cross_entropy(self.net(images), labels)

    @torch.no_grad()
    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        from pfl.metrics import Weighted

        self.eval()
        return {"loss": Weighted(F.cross_entropy(self.net(images), labels, reduction="sum").item(), len(labels))}


def rounds(config: dict[str, Any]) -> list[Clocks]:
    """The clocks at the end of each round."""
    work = Work.of(config)
    os.environ["PFL_PYTORCH_DEVICE"] = str(work.world.device)
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    ended = Rounds(work)

    class Clock(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(
            self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
        ) -> tuple[bool, Metrics]:
            ended.note(model.pytorch_model.net.state_dict())
            return False, Metrics()

    def user(client: int) -> PyTorchTensorDataset:
        images, labels = work.clients[client]
        order = torch.randperm(len(labels)).to(labels.device)
        return PyTorchTensorDataset((images[order], labels[order]), user_id=str(client))

    users = FederatedDataset(user, get_user_sampler("minimize_reuse", range(len(work.clients))))
    learner = Learner(work.first())
    model = PyTorchModel(learner, torch.optim.SGD, torch.optim.SGD(learner.parameters(), lr=1.0))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds,
            train_cohort_size=len(work.clients),
            val_cohort_size=None,
        ),
        SimulatedBackend(users, users, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_num_epochs=work.plan["epochs"],
            local_learning_rate=work.plan["lr"],
            local_batch_size=work.plan["batch_size"],
        ),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[Clock()],
        send_metrics_to_platform=False,
    )
    return ended.ended
