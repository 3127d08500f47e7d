"""Files that are whole or not there: checkpoints, saved models and what a run remembers of its clients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fl_sim.errors import RunError
from fl_sim.folder import require_file
from fl_sim.protocols import State
from fl_sim.writing import write_atomically

__all__ = ["CHECKPOINT", "Checkpoints", "load_tensors", "save_tensors", "write_atomically"]

FORMAT = 1
CHECKPOINT = "checkpoint.pt"
CLIENT_FOLDER = "clients"


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Save plain values and tensors in torch's own format, atomically."""
    write_atomically(path, lambda file: torch.save(dict(content), file))


def load_tensors(path: Path) -> dict[str, Any]:
    """What `save_tensors` saved; never unpickles anything but tensors and plain values."""
    require_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RunError(f"can't read {path}: {type(error).__name__}; it is damaged or not fl-sim's") from error
    if not isinstance(content, dict):
        raise RunError(f"can't read {path}: it is not fl-sim's")
    return content


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
            raise RunError(
                f"can't resume from {self._path}: format {content.get('format')}, this version reads {FORMAT}"
            )
        versions = content.get("clients")
        if not isinstance(versions, dict):
            raise RunError(f"can't resume from {self._path}: it does not say which clients remember something")
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
