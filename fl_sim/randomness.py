"""Randomness as an argument: every draw comes from a generator that a seed and a path name."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(seed: int, *path: str | int) -> int:
    """A 63-bit number that depends on the seed and on every part of the path, and on their types."""
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *path: str | int) -> torch.Generator:
    """A CPU generator, so that a seed means the same on every device."""
    return torch.Generator().manual_seed(key(seed, *path))


def repeated(attempt: int) -> tuple[int, ...]:
    """What the path of a round's draws ends with: nothing in the first attempt, its number in a later one."""
    return (attempt,) if attempt else ()


def numpy_generator(seed: int, *path: str | int) -> np.random.Generator:
    """The same for code that draws with numpy."""
    return np.random.default_rng(key(seed, *path))
