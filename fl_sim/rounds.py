"""The round loop: cohort, local training, aggregation, erasing, evaluation, record, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fl_sim.acceptance import Refusal, Replies, Tally, fault_in, needed, to_another
from fl_sim.attention_picture import Album
from fl_sim.checkpoint import Checkpoints, load_tensors, save_tensors
from fl_sim.detection import Screening
from fl_sim.errors import FolderError, RunError
from fl_sim.metrics import Score, defense_effectiveness, evaluate, is_finite, judged, refusal
from fl_sim.protocols import ServerContext, Signals, State, Tracker, Update, Watching
from fl_sim.randomness import generator, repeated
from fl_sim.signals import clean_score, noted, noted_erasing
from fl_sim.trackers.following import rebuild
from fl_sim.tracking import METRICS, JsonLines, read_metrics
from fl_sim.training import fit
from fl_sim.world import World

PREVIOUS = "previous global vector"
"""An entry of the attackers' briefing beside what their trigger has learned."""
ERASED = "received model was erased"
"""Another: what attackers notice of a server whose erasing they can't foretell."""
BEFORE_ERASING = "model_before_erasing.pt"


@dataclass(frozen=True)
class Order:
    """What one client is asked to do in a round."""

    client: int
    attack: bool
    rank: int = 0
    attackers: int = 0
    weight: float = 0.0
    attempt: int = 0
    """How often the round was tried before."""


class Exchange(Protocol):
    """Sends the global vector out and brings the updates back, however clients are run."""

    def train(self, round_: int, vector: Tensor, orders: Sequence[Order], briefing: State) -> Replies:
        """Each client's update, or why there is none that can be used; only attackers are given the briefing."""
        ...

    def private_states(self) -> Mapping[int, State]:
        """What clients have remembered since the last call, where this process keeps it."""
        ...

    def restore(self, states: Mapping[int, State]) -> None: ...

    def facts(self) -> Mapping[str, int]:
        """What the engine has to say about the last round, for the record."""
        ...


class Federation:
    """One federated run in a run folder: the loop and everything that survives from round to round."""

    def __init__(
        self, world: World, exchange: Exchange, folder: Path, trackers: Sequence[Tracker], plan: str = ""
    ) -> None:
        """`plan` names the configuration: a checkpoint of another one is refused."""
        self._plan = plan
        self._world = world
        self._parts = world.parts
        self._settings = world.parts.settings
        self._exchange = exchange
        self._folder = folder
        self._checkpoints = Checkpoints(folder)
        self._found = self._checkpoints.load()
        # A checkpoint holds all that `init` gave, whose file may have gone since.
        self._model = world.new_model() if self._found else world.initial_model()
        if self._found and not (folder / METRICS).exists():
            raise FolderError(f"can't resume {folder}: its {METRICS} is missing")
        self._metrics = JsonLines(folder)
        self._trackers = [self._metrics, *trackers]
        self._layout = world.layout
        self._vector = self._layout.read(self._model)
        self._scored: tuple[Tensor, Score] | None = None
        self._states: dict[str, State] = {"aggregator": {}, "server_optimizer": {}, "eraser": {}, "trigger": {}}
        self._backdoor = world.backdoor
        self._previous: Tensor | None = None
        self._attacked = False
        self._underway: list[tuple[int, int, int]] = []
        """Late replies that are still to arrive: client, round and attempt."""
        erasing = world.parts.erasing
        self._watching = erasing if isinstance(erasing, Watching) and world.parts.eraser is not None else None
        self._signals = Signals()
        self._erased_after = 0
        """The last round after which an erased model became the global one."""
        threatened = self._parts.attack is not None or self._parts.collusion is not None
        self._attackers = world.malicious if threatened else frozenset[int]()
        self._ranks = {client: rank for rank, client in enumerate(sorted(self._attackers))}

    def run(self) -> None:
        """Run all rounds that are still to be run, and save the final model."""
        try:
            for round_ in range(self._resume() + 1, self._settings.rounds + 1):
                self._round(round_)
            self._layout.load(self._model, self._vector)
            save_tensors(self._folder / "model.pt", self._model.state_dict())
            self._detect()
        finally:
            self._metrics.close()

    def _round(self, t: int) -> None:
        started = time.perf_counter()
        tally = Tally()
        updates = self._gather(t, tally)
        record = self._aggregate(t, updates) if updates else self._stand_still()
        record |= dict(self._exchange.facts())
        if tally.refusals or tally.attempts > 1 or not updates or self._parts.faults is not None:
            record |= tally.fields(skipped=not updates)
        cause = self._cause_to_erase(t, started, record)
        if cause is not None:
            self._erase(t, cause)
        if self._settings.eval.due(t, self._settings.rounds):
            record |= self._score(self._vector).fields()
        seconds = time.perf_counter() - started
        self._signals = replace(self._signals, elapsed_seconds=self._signals.elapsed_seconds + seconds)
        self.log("round", round=t, **record, seconds=seconds)
        if self._settings.checkpoint.due(t, self._settings.rounds):
            self._save(t)

    def _gather(self, t: int, tally: Tally) -> dict[int, Update]:
        """Updates of a quorum, by client id; none if there was no quorum, as often as the policy has it tried."""
        repeats = self._settings.repeats if self._settings.below_quorum == "repeat" else 0
        for attempt in range(repeats + 1):
            cohort = self._cohort(t, attempt)
            updates, refusals = self._collect(t, cohort, attempt, tally)
            if len(updates) >= needed(self._settings.quorum, len(cohort)):
                records = [update.record for update in updates.values() if update.record and _finite(update.record)]
                if records:  # the round's trigger is that of the lowest malicious client
                    self._adopt(records[0])
                return updates
        own = [each for each in refusals if each.own_error]
        if len(own) >= len(cohort):  # no misfortune but a fault that all clients meet: going on would hide it
            raise RunError(f"round {t}: every client failed; the first one with {own[0].detail}")
        return {}

    def _cohort(self, t: int, attempt: int = 0) -> list[int]:
        rng = generator(self._settings.seeds.threat, "cohort", t, *repeated(attempt))
        settings = self._settings
        drawn = self._parts.sampler.cohort(settings.clients, settings.clients_per_round, self._world.malicious, rng)
        # Who has no samples (only with `partition.min_samples=0`) says nothing: an update of zeros would be a vote.
        return [client for client in drawn if len(self._world.shares[client])] or drawn

    def _collect(
        self, t: int, cohort: list[int], attempt: int, tally: Tally
    ) -> tuple[dict[int, Update], list[Refusal]]:
        """The cohort's sound updates by client id, and what was refused."""
        weights = self._weights(cohort)
        attacking = [c for c in cohort if self._attacks(c, t)] if self._parts.attack is not None else []
        weight = sum(weights[cohort.index(client)] for client in attacking)
        orders = [
            Order(client, True, self._ranks[client], len(self._attackers), weight, attempt)
            if client in attacking
            else Order(client, False, attempt=attempt)
            for client in cohort
        ]
        briefing = dict(self._states["trigger"])
        if self._previous is not None:
            briefing[PREVIOUS] = self._previous
        if self._watching is not None:
            briefing[ERASED] = self._erased_after == t - 1 > 0
        replies = self._exchange.train(t, self._vector, orders, briefing)
        if attacking:
            self._previous = self._vector
        updates, tampered = self._tampered(t, {client: replies.updates[client] for client in sorted(replies.updates)})
        stale = [Refusal(client, "stale", to_another(answered, (t, attempt))) for client, *answered in self._underway]
        self._underway = [(client, t, attempt) for client in replies.underway]
        refusals = [*stale, *replies.refusals, *tampered]
        tally.add(len(cohort), refusals, replies.seconds)
        for each in refusals:
            event = "client_failed" if each.reason == "raised" else "client_refused"
            kind = {"kind": each.reason} if event == "client_refused" else {}
            self.log(event, round=t, client=each.client, **kind, reason=each.detail.splitlines()[0])
        if attacking and updates and not self._attacked:
            # A fault that every attacker meets, a setting that can't work: without it the run would look defended.
            own = {each.client: each.detail for each in refusals if each.own_error}
            if all(client in own for client in attacking):
                raise RunError(f"round {t}: every attacker failed; the first one with {own[attacking[0]]}")
            self._attacked = any(client in updates for client in attacking)
        return updates, refusals

    def _tampered(self, t: int, updates: dict[int, Update]) -> tuple[dict[int, Update], list[Refusal]]:
        """The updates with what omniscient attackers make of theirs, as far as the server takes that."""
        malicious = [client for client in updates if self._attacks(client, t)]
        if self._parts.collusion is None or not malicious:
            return updates, []
        split, told = self._layout.parameters, self._context(t, tuple(updates), "collusion")
        deltas = torch.stack([update.delta for update in updates.values()])
        flags = torch.tensor([client in malicious for client in updates], device=deltas.device)
        deltas[:, :split] = self._parts.collusion.tamper(deltas[:, :split], flags, told)
        found = {}
        refusals = []
        for client, delta in zip(updates, deltas, strict=True):
            wrong = fault_in(delta, self._vector)
            if wrong is None:
                found[client] = replace(updates[client], delta=delta)
            else:
                refusals.append(Refusal(client, *wrong))
        return found, refusals

    def _adopt(self, record: State) -> None:
        self._states["trigger"] = record
        self._backdoor = self._world.backdoor.recalling(record)
        self._scored = None

    def _attacks(self, client: int, t: int) -> bool:
        return client in self._attackers and self._parts.threat.active(t)

    def _weights(self, clients: Sequence[int]) -> list[float]:
        return self._parts.sampler.weights([max(len(self._world.shares[client]), 1) for client in clients])

    def _aggregate(self, t: int, updates: dict[int, Update]) -> dict[str, Any]:
        """Step the global vector; what the round's record says about it."""
        clients = tuple(updates)
        split = self._layout.parameters
        deltas = torch.stack([update.delta for update in updates.values()])
        weights = torch.tensor(self._weights(clients), device=deltas.device)
        ctx = self._context(t, clients)
        attacking = [self._attacks(client, t) for client in clients]
        result = self._parts.aggregator.aggregate(deltas[:, :split], weights, self._states["aggregator"], ctx)
        step, memory = self._parts.server_optimizer.step(result.delta, self._states["server_optimizer"])
        self._states |= {"aggregator": result.state, "server_optimizer": memory}
        # Batch normalisation's statistics are averaged over the clients that the rule kept.
        kept = torch.ones_like(weights, dtype=torch.bool) if result.kept is None else result.kept
        shares = weights[kept]
        buffers = (shares / shares.sum()) @ deltas[kept, split:]  # what was not kept may hold NaN
        self._vector = self._vector + torch.cat([step, buffers])
        self._layout.clamp_variances(self._vector)
        if self._watching is not None:
            self._signals = noted(self._signals, step, result.kept, self._clean_score())
        record: dict[str, Any] = {"clients": len(clients), "malicious": sum(attacking)}
        record["train_loss"] = sum(update.loss for update in updates.values()) / len(updates)
        known = {str(client): each.accuracy for client, each in updates.items() if each.accuracy is not None}
        if known:
            accuracies = known.values()
            record |= {"client_acc": sum(accuracies) / len(known), "client_acc_min": min(accuracies)}
            record["client_accs"] = known
        if result.kept is not None:
            record |= detection_rates(attacking, [not keep for keep in result.kept.tolist()])
        return record

    def _stand_still(self) -> dict[str, Any]:
        """A round without a quorum: the global model stays as it is, and so does what aggregation remembers."""
        if self._watching is not None:
            nothing = torch.zeros((), device=self._world.device)
            self._signals = noted(self._signals, nothing, None, self._clean_score())
        return {"clients": 0, "malicious": 0, "train_loss": None}

    def _clean_score(self) -> tuple[float, float] | None:
        """The global model's accuracy and loss on the clean set, where the policy watches them."""
        if self._watching is None or not self._watching.watches_clean_set or self._world.clean is None:
            return None
        self._layout.load(self._model, self._vector)
        return clean_score(self._model, self._world.clean)

    def _cause_to_erase(self, t: int, started: float, record: dict[str, Any]) -> str | None:
        """Why to erase after this round, None if there is no cause; what a watching policy saw goes into the record."""
        if self._parts.eraser is None:
            return None
        if self._watching is not None:
            seen = self._signals
            record |= {"rejected": seen.rejected[-1], "step": seen.steps[-1]}
            if seen.accuracies:
                record |= {"clean_acc": seen.accuracies[-1], "clean_loss": seen.losses[-1]}
            now = seen.elapsed_seconds + time.perf_counter() - started
            decision = self._watching.decide(replace(seen, elapsed_seconds=now))
            record["erasing_decision"] = decision.reason
            if decision.erase:
                return decision.reason
        return "due" if self._parts.erasing.due(t, self._settings.rounds) else None

    def _context(self, t: int, clients: tuple[int, ...], purpose: str = "aggregate") -> ServerContext:
        return ServerContext(
            round=t,
            rng=generator(self._settings.seeds.train, purpose, t),
            device=self._world.device,
            classes=self._parts.data.facts.classes,
            clients=clients,
            assumed_attackers=round(self._settings.assumed_attackers * len(clients)),
            layout=self._layout,
            vector=self._vector,
            clean=self._world.clean,
            augment=self._parts.data.augment,
            new_model=self._world.new_model,
            fit=fit,
        )

    def _erase(self, t: int, cause: str) -> None:
        """Run the eraser and take its model, unless it has diverged on the clean set."""
        assert self._parts.eraser is not None
        before = self._score(self._vector)
        save_tensors(self._folder / BEFORE_ERASING, self._model.state_dict())
        album = Album(self._folder, self._world.test, self._backdoor, self._settings.seeds.data)
        album.start("before", self._model)
        ctx = self._context(t, (), "erase")
        started = time.perf_counter()
        erased, memory = self._model, self._states["eraser"]
        if is_finite(self._vector):  # nothing can be learned from, or by, a model of NaN: it is refused as it is
            erased, memory = self._parts.eraser.erase(self._model, self._world.clean, memory, ctx)
        seconds = time.perf_counter() - started
        self._signals = noted_erasing(self._signals, seconds)
        vector = self._layout.read(erased)
        refused = refusal(self._model, erased, self._world.clean, self._parts.erasing.floor)
        if refused is None:
            self._vector = vector
            # What a server optimiser remembers are steps of the model that is gone: they would lead back to it.
            self._states |= {"eraser": memory, "server_optimizer": {}}
            self._erased_after = t
        after = self._score(vector) if is_finite(vector) else None
        record: dict[str, Any] = {"acc_before": before.acc, "asr_before": before.asr}
        record |= {"acc": after.acc if after else None, "asr": after.asr if after else None, "der": None}
        if after and before.asr is not None and after.asr is not None:
            record["der"] = defense_effectiveness(before.acc, before.asr, after.acc, after.asr)
        record |= {"ra_before": before.ra, "ra": after.ra if after else None}
        record["cause"] = cause
        if refused is not None:
            record["reason"] = refused
        self.log(
            "erase",
            round=t,
            eraser=self._settings.choices["eraser"],
            **record,
            seconds=seconds,
            accepted=refused is None,
        )
        album.add(str(self._settings.choices["eraser"]), erased)

    def _detect(self) -> None:
        """Try the detector on the final model; if it comes straight from an erasing, on what was erased, too."""
        detector, settings = self._parts.detection, self._settings
        if detector is None:
            return
        t, seed = settings.rounds, settings.seeds.train
        screening = Screening({str(settings.choices["detection"]): detector}, self._world.test, seed, self)
        ctx = self._context(t, (), "detect")
        # Read from the record, because a resumed run may find all its rounds done.
        erasings = [e for e in read_metrics(self._folder) if e["event"] == "erase" and e["round"] == t]
        if any(event["accepted"] for event in erasings):
            before = self._world.new_model()
            before.load_state_dict(load_tensors(self._folder / BEFORE_ERASING))
            screening.inspect("before_erasing", before, self._backdoor, ctx)
        screening.inspect("final", self._model, self._backdoor, ctx)

    def _score(self, vector: Tensor) -> Score:
        """Score a vector, leaving it loaded in the server's model; the same vector is not scored twice."""
        if self._scored is None or self._scored[0] is not vector:
            self._layout.load(self._model, vector)
            per_class = self._settings.eval.per_class
            score = evaluate(self._model, self._world.test, self._backdoor, per_class=per_class)
            self._scored = vector, judged(score, is_finite(vector))
        return self._scored[1]

    def log(self, event: str, **fields: Any) -> None:
        """As a tracker: to all of the run's trackers."""
        for tracker in self._trackers:
            tracker.log(event, **fields)

    def _save(self, t: int) -> None:
        counters = {name: buffer for name, buffer in self._model.state_dict().items() if not buffer.is_floating_point()}
        content = {
            "names": list(self._layout.names),
            "vector": self._vector.cpu(),
            "counters": counters,
            "states": {name: dict(state) for name, state in self._states.items()},
            "metrics_length": self._metrics.commit(),
            "attacked": self._attacked,
            "plan": self._plan,
        }
        if self._underway:
            content["underway"] = [list(each) for each in self._underway]
        if self._previous is not None:
            content["previous"] = self._previous.cpu()
        if self._watching is not None:
            content |= {"signals": asdict(self._signals), "erased_after": self._erased_after}
        self._checkpoints.save(t, content, self._exchange.private_states())

    def _resume(self) -> int:
        """The last finished round, with everything put back as it was after it; 0 for a new run."""
        if self._found is None:
            self._metrics.rewind(0)
            rebuild(self._trackers, self._folder)
            return 0
        content, clients = self._found
        self._found = None
        try:
            length, finished = self._put_back(content, clients)
        except RunError:
            raise
        except Exception as error:  # whatever of it has another type or shape than what was saved
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise FolderError(f"can't resume {self._folder}: its checkpoint is damaged ({said})") from error
        self._metrics.rewind(length, finished)
        rebuild(self._trackers, self._folder)
        return finished

    def _put_back(self, content: Mapping[str, Any], clients: Mapping[int, State]) -> tuple[int, int]:
        """Take up what a checkpoint holds; how long the record was then, and the round after which that was."""
        vector = content["vector"].to(self._world.device)
        fits = vector.shape == self._vector.shape and vector.dtype == self._vector.dtype
        if content["names"] != list(self._layout.names) or not fits:
            raise FolderError(f"can't resume {self._folder}: its checkpoint is of another model")
        if content.get("plan", self._plan) != self._plan:
            raise FolderError(f"can't resume {self._folder}: its checkpoint is of another configuration")
        self._vector = vector
        self._model.load_state_dict(content["counters"], strict=False)
        self._states |= {name: dict(content["states"][name]) for name in self._states}
        self._adopt(self._states["trigger"])
        self._attacked = bool(content.get("attacked", False))
        self._underway = [(client, round_, number) for client, round_, number in content.get("underway", ())]
        if "previous" in content:
            self._previous = content["previous"].to(self._world.device)
        if "signals" in content:
            self._signals, self._erased_after = Signals(**content["signals"]), content["erased_after"]
        self._exchange.restore(clients)
        return int(content["metrics_length"]), int(content["round"])


def _finite(record: State) -> bool:
    """Whether a trigger's record can be used at all."""
    return all(is_finite(value) for value in record.values() if isinstance(value, Tensor))


def detection_rates(attacking: Sequence[bool], rejected: Sequence[bool]) -> dict[str, float]:
    """TPR: the share of attackers rejected; FPR: the share of honest clients rejected; each where there are any."""
    rates = {}
    for name, group in (("tpr", True), ("fpr", False)):
        flags = [flag for flag, bad in zip(rejected, attacking, strict=True) if bad is group]
        if flags:
            rates[name] = sum(flags) / len(flags)
    return rates
