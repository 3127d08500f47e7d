"""What every simulator is given, that all do the same work; and the counts that show whether they did.

With FL_SIM_COUNT naming a file, every training pass of whatever process and every round's end adds a line to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from engines import Clocks, clocks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

from fl_sim.build import to_text, world_of
from fl_sim.models.classifier import Classifier
from fl_sim.samples import to_pixels
from fl_sim.world import World

COUNT = "FL_SIM_COUNT"


class Net(nn.Module):
    """A configuration's network as a user would write it, in PyTorch's usual memory layout."""

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, mean: Sequence[float] = (), std: Sequence[float] = ()) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body((x - self.mean) / self.std if len(self.mean) else x)
        return logits


@dataclass(frozen=True)
class Work:
    """Federated averaging of all clients in every round, as a configuration has it."""

    config: dict[str, Any]

    @classmethod
    def of(cls, config: dict[str, Any]) -> Work:
        torch.set_num_threads(1)
        return cls(config)

    @cached_property
    def world(self) -> World:
        return world_of(to_text(self.config))

    @property
    def rounds(self) -> int:
        return int(self.config["rounds"])

    @property
    def plan(self) -> dict[str, Any]:
        """`epochs`, `batch_size` and `lr`."""
        plan: dict[str, Any] = self.config["client"]
        return plan

    @property
    def workers(self) -> int:
        """`auto` is one for every core that this process may use."""
        asked = self.config["engine"]["workers"]
        return len(os.sched_getaffinity(0)) if asked == "auto" else int(asked)

    @cached_property
    def clients(self) -> list[tuple[Tensor, Tensor]]:
        """Each client's pixels in [0, 1] and labels, in memory before the first round."""
        shares = (self.world.samples_of(client) for client in range(self.config["clients"]))
        return [(to_pixels(share.images), share.labels) for share in shares]

    def net(self, normalised: bool = False) -> Net:
        """A fresh network, as its layers' constructors draw it; for pixels, or for images normalised already."""
        facts = self.world.parts.data.facts
        body, _ = self.world.parts.model.body(facts.shape, facts.classes)
        return Net(body) if normalised else Net(body, facts.mean, facts.std)

    def first(self, normalised: bool = False) -> Net:
        """A network with the weights that fl-sim starts from."""
        net = self.net(normalised)
        net.load_state_dict(self.world.new_model().state_dict())
        return net.to(self.world.device)

    @torch.no_grad()
    def loss(self, state: Mapping[str, Tensor]) -> float:
        """The global model's loss on the clients' samples, by its batches' statistics: not all average BN's own."""
        model = self.first()
        model.load_state_dict(state)
        losses = [F.cross_entropy(model(images), labels).item() for images, labels in self.clients]
        return sum(losses) / len(losses)


class Rounds:
    """Where the clocks stood at the end of each round."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.ended: list[Clocks] = []

    def note(self, state: Mapping[str, Tensor]) -> None:
        """A round has ended with this global model."""
        self.ended.append(clocks())
        if COUNT in os.environ:
            told(loss=self.work.loss(state))


def told(**facts: float) -> None:
    with Path(os.environ[COUNT]).open("a") as file:  # short lines are appended whole
        file.write(json.dumps(facts) + "\n")


def _count(module: nn.Module, inputs: Sequence[Tensor]) -> None:
    if isinstance(module, (Classifier, Net)) and module.training and torch.is_grad_enabled():
        told(samples=len(inputs[0]))


if COUNT in os.environ:
    register_module_forward_pre_hook(_count)


def counted(file: Path) -> dict[str, float]:
    """Steps and samples a round, and the last loss, from the lines that a run has left."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    samples = [line["samples"] for line in lines if "samples" in line]
    return {"steps": len(samples) / len(losses), "samples": sum(samples) / len(losses), "loss": losses[-1]}
