"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from fl_sim.errors import RunError
from fl_sim.interruption import undisturbed


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside the file, flush to disk, then rename: a crash leaves the old file or the new one, never a half."""
    beside = path.with_name(f".{path.name}.part")
    with undisturbed():
        try:
            with beside.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException as error:
            beside.unlink(missing_ok=True)
            refused = _of_the_disk(error)
            if refused is not None:
                raise RunError(f"can't write {path}: {refused.strerror or refused}") from error
            raise


def _of_the_disk(error: BaseException | None) -> OSError | None:
    """The disk's refusal behind an error: `torch.save` closes its archive all the same, and complains of that."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
