"""The Flower ServerApp: runs the round loop over a Grid."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, runtime_checkable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from fl_sim.build import Config, build, config_text, to_text, trackers_of, world_of
from fl_sim.console import Progress
from fl_sim.engines.records import TensorArray, by_reference, pack, to_tensor, unpack
from fl_sim.errors import RunError
from fl_sim.execution import resume, start
from fl_sim.folder import new_run_folder
from fl_sim.protocols import State, Update
from fl_sim.rounds import Federation, Order
from fl_sim.world import World

app = ServerApp()
PATIENCE = "patience-seconds"
"""How long to wait for as many nodes as clients: a key that only Flower's own run config has (pyproject.toml)."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or go on with, the run whose config and folder the run config names.

    fl-sim's engines leave the run's beginning and end to fl-sim; under `flwr run` there is nobody else to see to them.
    """
    if PATIENCE in context.run_config:
        _from_beginning_to_end(grid, context.run_config)
    else:
        _federate(str(context.run_config["config"]), Path(str(context.run_config["folder"])), grid)


def _federate(config: str, folder: Path, grid: Grid) -> None:
    world = world_of(config)
    settings = world.parts.settings
    with Progress(settings.rounds, title=settings.name) as progress:
        Federation(world, GridExchange(grid), folder, [*trackers_of(config, folder), progress]).run()


def _from_beginning_to_end(grid: Grid, run_config: Mapping[str, object]) -> None:
    """A run under Flower's own command, with everything that a run folder holds; one that is there already goes on."""
    text = config_text(run_config)
    settings = build(config := json.loads(text)).settings
    await_nodes(grid, settings.clients, float(str(run_config[PATIENCE])))

    def execute(config: Config, world: World, folder: Path) -> None:
        with world.parts.engine.computing():
            _federate(to_text(config), folder, grid)

    folder = Path(str(run_config["folder"] or new_run_folder(settings.output, settings.name)))
    if (folder / "config.yaml").exists():
        resume(folder, execute)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        start(config, folder, ["flwr", "run"], execute)


def await_nodes(grid: Grid, clients: int, seconds: float) -> None:
    """Wait until there is a node for each client."""
    until = time.monotonic() + seconds
    while (there := len(list(grid.get_node_ids()))) < clients:
        if time.monotonic() > until:
            advice = f'in a simulation: flwr run . --federation-config "num-supernodes={clients}"'
            raise RunError(f"clients={clients}: only {there} nodes after {seconds:g} seconds; {advice}")
        time.sleep(0.1)


@runtime_checkable
class KeepsStates(Protocol):
    """A Grid that keeps its clients' private state in this process."""

    def private_states(self) -> Mapping[int, State]: ...

    def restore(self, states: Mapping[int, State]) -> None: ...


@runtime_checkable
class Telling(Protocol):
    """A Grid that has something to say about the last round."""

    def facts(self) -> Mapping[str, int]: ...


class GridExchange:
    """Orders as Flower Messages: the i-th node in sorted order serves client i for the whole run."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._nodes = sorted(grid.get_node_ids())
        self._client_at = {node: client for client, node in enumerate(self._nodes)}

    def train(
        self, round_: int, vector: Tensor, orders: Sequence[Order], briefing: State
    ) -> Mapping[int, Update | str]:
        array = TensorArray(vector)  # shared: only its container is made anew for each client
        messages = [
            Message(
                RecordDict(
                    {
                        "model": by_reference({"vector": array}),
                        "order": ConfigRecord({"round": round_} | asdict(order)),
                        **(pack(briefing) if order.attack else {}),
                    }
                ),
                dst_node_id=self._nodes[order.client],
                message_type="train",
                group_id=str(round_),
            )
            for order in orders
        ]
        replies = self._grid.send_and_receive(messages)
        return {self._client_at[reply.metadata.src_node_id]: self._read(reply, vector) for reply in replies}

    def private_states(self) -> Mapping[int, State]:
        return self._grid.private_states() if isinstance(self._grid, KeepsStates) else {}

    def restore(self, states: Mapping[int, State]) -> None:
        if isinstance(self._grid, KeepsStates):
            self._grid.restore(states)

    def facts(self) -> Mapping[str, int]:
        return self._grid.facts() if isinstance(self._grid, Telling) else {}

    def _read(self, reply: Message, vector: Tensor) -> Update | str:
        if reply.has_error():
            return reply.error.reason or f"error {reply.error.code}"
        metrics = reply.content.metric_records["metrics"]
        return Update(
            delta=to_tensor(reply.content.array_records["update"]["delta"], vector.device),
            samples=int(metrics["num-examples"]),  # type: ignore[arg-type]
            loss=float(metrics["loss"]),  # type: ignore[arg-type]
            record=unpack(reply.content, vector.device) or None,
            accuracy=float(metrics["accuracy"]) if "accuracy" in metrics else None,  # type: ignore[arg-type]
        )
