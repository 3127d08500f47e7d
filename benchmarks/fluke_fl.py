"""Federated averaging by fluke (Polato, fluke-fl), with its default client and server.

Its own loop (`FedAVG.run`) in one process; every client keeps a model and an optimizer of its own, as is its default;
its FastDataLoader shuffles a client's tensors for each epoch. The same weights, and batch normalisation's statistics
averaged as the others average them; of `num_batches_tracked` it keeps the largest. All evaluation is turned off.
"""

from __future__ import annotations

from typing import Any

from engines import Clocks
from same_work import Rounds, Work


def rounds(config: dict[str, Any]) -> list[Clocks]:
    """The clocks at the end of each round."""
    from fluke import DDict, FlukeENV
    from fluke.algorithms.fedavg import FedAVG
    from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
    from fluke.utils import FederationObserver

    work = Work.of(config)
    plan, classes = work.plan, work.world.parts.data.facts.classes
    environment = FlukeENV()
    environment.set_seed(0)
    environment.set_device(str(work.world.device))
    environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    loaders = [
        FastDataLoader(*tensors, num_labels=classes, batch_size=plan["batch_size"], shuffle=True, skip_singleton=False)
        for tensors in work.clients
    ]
    data = DummyDataContainer(loaders, [None] * len(loaders), None, classes)
    choices = DDict(
        model=work.first(),
        client=DDict(
            batch_size=plan["batch_size"],
            local_epochs=plan["epochs"],
            loss="CrossEntropyLoss",
            optimizer=DDict(name="SGD", lr=plan["lr"]),
            scheduler=DDict(name="StepLR", step_size=1, gamma=1),
        ),
        server=DDict(weighted=True),
    )
    federation = FedAVG(len(loaders), DataSplitter(data), choices)
    ended = Rounds(work)

    class Clock(FederationObserver):  # type: ignore[misc]
        def end_round(self, round: int) -> None:  # noqa: A002
            ended.note(federation.server.model.state_dict())

    federation.set_callbacks([Clock()])
    federation.run(n_rounds=work.rounds, eligible_perc=1.0)
    return ended.ended
