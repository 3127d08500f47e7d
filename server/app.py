"""The Flower ServerApp: runs the round loop over a Grid."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from fl_sim.acceptance import Refusal, Replies
from fl_sim.build import build, config_text, plan_hash, to_text, trackers_of, world_of
from fl_sim.composing import Config
from fl_sim.console import Progress
from fl_sim.engines.records import TensorArray, by_reference, pack
from fl_sim.engines.replies import read_replies
from fl_sim.errors import RunError
from fl_sim.execution import resume, start
from fl_sim.folder import new_run_folder
from fl_sim.protocols import State, Tracker
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
        trackers: list[Tracker] = [*trackers_of(config, folder), progress]
        Federation(world, GridExchange(grid, world), folder, trackers, plan_hash(json.loads(config))).run()


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
    """Orders as Flower Messages: the i-th node in sorted order serves client i for the whole run.

    It is the network, too: what `faults=` makes of messages on their way, losing them, doubling them or bringing them
    late on a simulated clock, happens here. What clients do themselves happens in the ClientApp.
    """

    def __init__(self, grid: Grid, world: World) -> None:
        self._grid = grid
        self._world = world
        self._nodes = sorted(grid.get_node_ids())
        self._client_at = {node: client for client, node in enumerate(self._nodes)}

    def train(self, round_: int, vector: Tensor, orders: Sequence[Order], briefing: State) -> Replies:
        array = TensorArray(vector)  # shared: only its container is made anew for each client
        faults = {each.client: self._world.fault_of(each.client, round_, each.attempt) for each in orders}
        messages = [
            Message(
                RecordDict(
                    {
                        "model": by_reference({"vector": array}),
                        "order": ConfigRecord({"round": round_} | vars(order)),
                        **(pack(briefing) if order.attack else {}),
                    }
                ),
                dst_node_id=self._nodes[order.client],
                message_type="train",
                group_id=str(round_),
            )
            for order in orders
            if faults[order.client].kind != "silent"
        ]
        replies = self._grid.send_and_receive(messages, timeout=self._world.parts.settings.timeout) if messages else []
        late, seconds = self._clock({client: fault.seconds for client, fault in faults.items()})
        arrived = []
        for reply in replies:
            client = self._client_at.get(reply.metadata.src_node_id)
            if client not in late:
                arrived += [reply] * (2 if client in faults and faults[client].kind == "duplicate" else 1)
        asked = [(order.client, round_, order.attempt) for order in orders if order.client not in late]
        updates, refusals = read_replies(arrived, asked, self._client_at, vector)
        refusals += [Refusal(client, "late", "the reply did not come before the deadline") for client in late]
        refusals.sort(key=lambda refusal: -1 if refusal.client is None else refusal.client)
        known = self._world.parts.faults
        return Replies(updates, refusals, late if known is not None and known.comes_later else (), seconds)

    def _clock(self, arrivals: Mapping[int, float | None]) -> tuple[list[int], float | None]:
        """Who comes after the deadline, and how long the server waits: for the last, or until then."""
        times = {client: seconds for client, seconds in arrivals.items() if seconds is not None}
        deadline = None if self._world.parts.faults is None else self._world.parts.faults.deadline
        if deadline is None:
            return [], max(times.values(), default=None)
        late = sorted(client for client, seconds in times.items() if seconds > deadline)
        return late, deadline if late or len(times) < len(arrivals) else max(times.values())

    def private_states(self) -> Mapping[int, State]:
        return self._grid.private_states() if isinstance(self._grid, KeepsStates) else {}

    def restore(self, states: Mapping[int, State]) -> None:
        if isinstance(self._grid, KeepsStates):
            self._grid.restore(states)

    def facts(self) -> Mapping[str, int]:
        return self._grid.facts() if isinstance(self._grid, Telling) else {}
