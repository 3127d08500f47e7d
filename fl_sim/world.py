"""Everything that a run's configuration names, built: the data and the components that server and clients share."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fl_sim.backdoor import Backdoor
from fl_sim.data.dataset import Dataset, Source, hold_out
from fl_sim.errors import ConfigError, require
from fl_sim.layout import Layout
from fl_sim.models.classifier import Architecture, Classifier, Compute, build_classifier
from fl_sim.protocols import (
    Aggregator,
    Attack,
    Client,
    Collusion,
    Detector,
    Eraser,
    ErasingPolicy,
    Fault,
    Faults,
    Indices,
    Partition,
    Sampler,
    ServerOptimizer,
    Threat,
    Trigger,
)
from fl_sim.randomness import generator, numpy_generator, repeated
from fl_sim.samples import Samples
from fl_sim.schema import Settings


class Engine(Protocol):
    """Executes a run's ServerApp and ClientApp."""

    @property
    def compute(self) -> Compute: ...

    def computing(self) -> AbstractContextManager[None]:
        """As the server computes, for what is done outside a run."""
        ...

    def run(self, run_config: Mapping[str, str], clients: int, device: torch.device) -> None: ...


@dataclass(frozen=True)
class Parts:
    """The components of a run, built and checked, before any data is loaded."""

    settings: Settings
    data: Source
    partition: Partition
    model: Architecture
    client: Client
    attack: Attack | None
    collusion: Collusion | None
    trigger: Trigger
    threat: Threat
    sampler: Sampler
    aggregator: Aggregator
    server_optimizer: ServerOptimizer
    eraser: Eraser | None
    erasing: ErasingPolicy
    detection: Detector | None
    faults: Faults | None
    engine: Engine
    erasers: Mapping[str, Eraser]
    """Those that `fl-sim central` tries."""
    baselines: Mapping[str, Eraser]
    """Those that are tried centrally beside a federated run."""
    detectors: Mapping[str, Detector]
    """Those that `fl-sim central` tries on the victim and on every erased model."""


@dataclass(frozen=True)
class World:
    """A run's components with its data on the device, split between clients and server."""

    parts: Parts
    device: torch.device
    train: Samples
    test: Samples
    clean: Samples | None
    shares: list[Indices]
    """The training samples of each client, as indices."""
    malicious: frozenset[int]
    """Who is malicious, or with `attack=none` would be."""
    _local: threading.local = field(default_factory=threading.local, repr=False)

    @cached_property
    def backdoor(self) -> Backdoor:
        trigger = self.parts.trigger
        goal = self.parts.settings.backdoor.resolved(trigger)
        return Backdoor(trigger, goal, self.parts.data.facts.classes)

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self.new_model())

    def new_model(self) -> Classifier:
        """A model with the run's fresh weights."""
        facts = self.parts.data.facts
        rng = generator(self.parts.settings.seeds.train, "model")
        compute = self.parts.engine.compute
        built = build_classifier(self.parts.model, facts.shape, facts.classes, facts.mean, facts.std, rng, compute)
        return built.to(self.device)

    def initial_model(self) -> Classifier:
        """The global model before the first round: fresh, or read from `init`."""
        model = self.new_model()
        if self.parts.settings.init is not None:
            load_weights(self.parts.settings.init, model)
        return model

    def worker_model(self) -> Classifier:
        """This thread's own model, to be loaded in place for one client after another."""
        if not hasattr(self._local, "model"):
            self._local.model = self.new_model()
        model: Classifier = self._local.model
        return model

    def samples_of(self, client: int) -> Samples:
        return self.train[torch.from_numpy(self.shares[client])]

    def fault_of(self, client: int, round_: int, attempt: int) -> Fault:
        """What goes wrong with a client's answer: the same for everyone who asks."""
        if self.parts.faults is None:
            return Fault()
        seed = self.parts.settings.seeds.threat
        return self.parts.faults.draw(generator(seed, "faults", client, round_, *repeated(attempt)))


def populate(parts: Parts, device: torch.device) -> World:
    """Load the data and divide it: the server's clean set first, the rest among the clients."""
    settings = parts.settings
    loaded: Dataset = parts.data.load()
    clean, rest = hold_out(loaded.train, parts.data.clean_fraction, settings.seeds.data)
    pool = rest.numpy()
    labels = loaded.train.labels.numpy()[pool]
    try:
        shares = parts.partition.split(labels, settings.clients, numpy_generator(settings.seeds.data, "partition"))
    except ConfigError as error:  # what can't be known before the labels are
        raise error.within("partition") from error
    on_device = loaded.to(device)
    return World(
        parts=parts,
        device=device,
        train=on_device.train,
        test=on_device.test,
        clean=None if clean is None else Samples(clean.images.to(device), clean.labels.to(device)),
        shares=[np.ascontiguousarray(pool[share]) for share in shares],
        malicious=parts.threat.malicious(settings.clients, generator(settings.seeds.threat, "malicious")),
    )


def pick_device(name: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; a `ConfigError` if this machine lacks it."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cpu", *(f"cuda:{index}" for index in range(gpus))]
    if torch.backends.mps.is_available():
        here.append("mps")
    if name == "auto":
        return torch.device("cuda:0" if gpus else "cpu")
    if name == "cuda" and gpus:
        return torch.device("cuda:0")
    if name in here:
        return torch.device(name)
    raise ConfigError("device", name, f"not on this machine; there are auto, {', '.join(here)}")


def digest(decisive: Mapping[str, Any]) -> str:
    """A short name for whatever these values decide."""
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(path: str) -> str:
    """Tells whether a file to start from is still the same; one that can't be read is complained of elsewhere."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else path
    except (OSError, ValueError):
        return path


def load_weights(path: str, model: Classifier) -> None:
    """Put the weights of a saved model of the same layout into `model`."""
    saved = _read_tensors(path)
    own = model.state_dict()
    reason = _first_difference(saved, own)
    require(reason is None, "init", path, f"not a saved model of this run's architecture: {reason}")
    # As the run holds them: what a float64 can hold may be infinite here.
    finite = all(bool(tensor.to(own[name].dtype).isfinite().all()) for name, tensor in saved.items())
    require(finite, "init", path, "the saved model holds NaN or infinity")
    model.load_state_dict(saved)


def _read_tensors(path: str) -> dict[str, Tensor]:
    """The tensors by name that a file holds, if it is a model's."""
    try:
        ordinary = not Path(path).exists() or Path(path).is_file() or Path(path).is_dir()
        require(ordinary, "init", path, "not a saved model: no regular file")  # reading a pipe would wait for ever
        saved = torch.load(Path(path), map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError("init", path, "no such file") from error
    except OSError as error:
        raise ConfigError("init", path, f"can't be read: {error.strerror or error}") from error
    except Exception as error:  # torch, zip and pickle have many words for this
        kinds = "it is damaged, no file of torch.save's, or holds more than tensors"
        raise ConfigError("init", path, f"not a saved model: {kinds}") from error
    if isinstance(saved, dict) and {"format", "vector"} <= set(saved):
        raise ConfigError("init", path, "not a saved model but a run's checkpoint; its last model is in model.pt")
    tensors = isinstance(saved, dict) and all(isinstance(value, Tensor) for value in saved.values())
    require(tensors, "init", path, "not a saved model: it holds no state_dict(), tensors by their names")
    return dict(saved)


def _first_difference(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """What tells a saved state from this model's, in plain words; None if nothing does."""
    counts = f"it holds {len(saved)} tensors, this run's model {len(own)}"
    for name, tensor in own.items():
        if name not in saved:
            return f"{counts}; the first that it lacks is {name}"
        given = saved[name]
        if given.layout != torch.strided or given.device.type != "cpu" or given.is_complex() != tensor.is_complex():
            return f"{counts}; {name} is no ordinary tensor of real numbers"
        if given.shape != tensor.shape:
            sizes = ["×".join(map(str, each.shape)) or "a number" for each in (saved[name], tensor)]
            return f"the first tensor that differs is {name}: {sizes[0]} there, {sizes[1]} here"
    surplus = [name for name in saved if name not in own]
    return f"{counts}; the first that is unknown here is {surplus[0]}" if surplus else None
