"""The Flower ClientApp: one message asks one client for one update."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.faults import spoiled
from fl_sim.build import config_text, world_of
from fl_sim.engines.records import TensorArray, by_reference, pack, record_of, to_tensor, unpack
from fl_sim.engines.replies import header
from fl_sim.errors import InjectedCrash
from fl_sim.protocols import ClientContext, ServerPlan, Threatening, Update
from fl_sim.randomness import generator, repeated
from fl_sim.rounds import ERASED, PREVIOUS
from fl_sim.together.meeting import client_fit
from fl_sim.world import World

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the client that the order names, honestly or not, and reply with its update."""
    world = world_of(config_text(context.run_config))
    order = record_of(message.content, "order", ConfigRecord)
    client = int(order["client"])  # type: ignore[arg-type]
    round_, attempt = int(order["round"]), int(order["attempt"])  # type: ignore[arg-type]
    fault = world.fault_of(client, round_, attempt).kind
    if fault == "crash":
        raise InjectedCrash(f"client {client} crashes in round {round_}, as faults= says")
    received = to_tensor(record_of(message.content, "model", ArrayRecord)["vector"], world.device)
    threatening = _threatening(world, order, message.content) if order["attack"] else None
    actor = world.parts.client if threatening is None else world.parts.attack
    assert actor is not None
    model = world.worker_model()
    world.layout.load(model, received)
    ctx = ClientContext(
        round=round_,
        client=client,
        rng=generator(world.parts.settings.seeds.train, "client", client, round_, *repeated(attempt)),
        classes=world.parts.data.facts.classes,
        layout=world.layout,
        received=received,
        augment=world.parts.data.augment,
        fit=client_fit(),
        private=unpack(context.state, world.device),
        threatening=threatening,
    )
    samples = world.samples_of(client)
    # Who has no samples (only with `partition.min_samples=0`) has nothing to say.
    update = actor.update(model, samples, ctx) if len(samples) else Update(torch.zeros_like(received), 0, 0.0)
    if update.private is not None:
        context.state = pack(update.private)
    metrics: dict[str, int | float | list[int] | list[float]] = {"num-examples": update.samples, "loss": update.loss}
    if update.accuracy is not None:
        metrics["accuracy"] = update.accuracy
    delta = TensorArray(spoiled(update.delta, fault))
    name = "weights" if fault == "wrong_name" else "delta"
    said = (client + 1) % world.parts.settings.clients if fault == "wrong_client" else client
    reply = RecordDict(
        {
            "update": by_reference({name: delta}),
            "metrics": MetricRecord({} if fault == "malformed" else metrics),
            "client": header(said, round_ - 1 if fault == "stale" else round_, attempt),
        }
    )
    if update.record is not None:
        reply.update(pack(update.record))
    return Message(RecordDict() if fault == "empty" else reply, reply_to=message)


def _threatening(world: World, order: ConfigRecord, content: RecordDict) -> Threatening:
    """An attacker's knowledge, the briefing that came with its order included."""
    briefing = dict(unpack(content, world.device))
    previous = briefing.pop(PREVIOUS, None)
    noticed = {int(order["round"]): bool(briefing.pop(ERASED, False))}  # type: ignore[arg-type]
    parts = world.parts
    return Threatening(
        backdoor=world.backdoor.recalling(briefing),
        rank=int(order["rank"]),  # type: ignore[arg-type]
        attackers=int(order["attackers"]),  # type: ignore[arg-type]
        weight=float(order["weight"]),  # type: ignore[arg-type]
        server_rate=parts.server_optimizer.rate,
        previous=previous if isinstance(previous, torch.Tensor) else None,
        record=briefing,
        plan=ServerPlan(parts.eraser, parts.erasing, parts.settings.rounds, noticed),
    )
