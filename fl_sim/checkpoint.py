"""Files that are whole or not there: checkpoints, saved models and what a run remembers of its clients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fl_sim.errors import FolderError
from fl_sim.folder import require_file
from fl_sim.protocols import State
from fl_sim.writing import write_atomically

__all__ = ["CHECKPOINT", "Checkpoints", "check_checkpoint", "load_tensors", "save_tensors", "write_atomically"]

FORMAT = 1
CHECKPOINT = "checkpoint.pt"
CLIENT_FOLDER = "clients"


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Save plain values and tensors in torch's own format, atomically."""
    write_atomically(path, lambda file: torch.save(dict(content), file))


def load_tensors(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """What `save_tensors` saved; never unpickles anything but tensors and plain values.

    `mapped`: tensors stay in the file until they are used.
    """
    require_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise FolderError(f"can't read {path}: {type(error).__name__}; it is damaged or not fl-sim's") from error
    if not isinstance(content, dict):
        raise FolderError(f"can't read {path}: it is not fl-sim's")
    return content


def check_checkpoint(folder: Path, model: nn.Module, rounds: int) -> None:
    """Refuse a checkpoint that this model or so many rounds can't go on from, before anything is written.

    Whether its vector is the model's is asked where that is taken up, with the plan.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return
    content = load_tensors(path, mapped=True)
    if content.get("format") != FORMAT:
        return  # that is said by whoever loads it
    wrong = _fault_in(content)
    if wrong is not None:
        raise FolderError(f"can't resume {folder}: its checkpoint is damaged ({wrong})")
    done = content.get("round", 0)
    if done > rounds:
        raise FolderError(f"can't resume {folder}: {done} rounds are done, but its configuration has rounds={rounds}")
    known = {name: buffer.shape for name, buffer in model.state_dict().items() if not buffer.is_floating_point()}
    if {name: counter.shape for name, counter in content.get("counters", {}).items()} != known:
        raise FolderError(f"can't resume {folder}: its checkpoint is damaged (its counters are not the model's)")


def _fault_in(content: Mapping[str, Any]) -> str | None:
    """What is wrong with the parts of a checkpoint that are there; None if nothing is."""
    for key in ("round", "metrics_length"):
        value = content.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            return f"{key}={str(value)[:40]}"
    for key in ("vector", "previous"):
        if key in content and not _is_vector(content[key]):
            return f"its {key} is not a plain vector"
    if "previous" in content and content["previous"].shape != getattr(content.get("vector"), "shape", None):
        return "its previous vector has another length than its vector"
    counters = content.get("counters", {})
    if not isinstance(counters, dict) or not all(_is_plain(counter) for counter in counters.values()):
        return "its counters are not plain tensors"
    return None


def _is_vector(value: object) -> bool:
    return _is_plain(value) and value.ndim == 1 and value.is_floating_point()


def _is_plain(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor as a run saves them: dense, with its numbers, outside of any graph."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.requires_grad
    )


class Checkpoints:
    """The checkpoint of a run folder: one file, and one for each client that remembers something.

    A client's file carries its round in its name and the checkpoint says which one counts, so the set is consistent
    whenever the process dies; files that no checkpoint names any more are removed afterwards.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / CHECKPOINT
        self._clients = folder / CLIENT_FOLDER
        self._versions: dict[int, int] = {}

    def load(self) -> tuple[dict[str, Any], dict[int, State]] | None:
        """The last checkpoint and the clients' states, or None before the first."""
        if not self._path.exists():
            return None
        content = load_tensors(self._path)
        if content.get("format") != FORMAT:
            raise FolderError(
                f"can't resume from {self._path}: format {content.get('format')}, this version reads {FORMAT}"
            )
        versions = content.get("clients")
        if not isinstance(versions, dict):
            raise FolderError(f"can't resume from {self._path}: it does not say which clients remember something")
        wrong = _fault_in(content)
        if wrong is not None:
            raise FolderError(f"can't resume {self._path.parent}: its checkpoint is damaged ({wrong})")
        self._versions = versions
        return content, {client: load_tensors(self._file(client)) for client in self._versions}

    def save(self, round_: int, content: Mapping[str, Any], changed: Mapping[int, State]) -> None:
        """Commit a round: new client files first, then the checkpoint that names them."""
        if changed:
            self._clients.mkdir(exist_ok=True)
        stale = [self._file(client) for client in changed if client in self._versions]
        for client, state in changed.items():
            self._versions[client] = round_
            save_tensors(self._file(client), state)
        save_tensors(self._path, {**content, "format": FORMAT, "round": round_, "clients": dict(self._versions)})
        for path in stale:
            if path not in {self._file(client) for client in changed}:
                path.unlink(missing_ok=True)

    def _file(self, client: int) -> Path:
        return self._clients / f"{client}_{self._versions[client]}.pt"
