"""How a GPU computes while a run is on: the same bits each time, unless speed was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fl_sim.models.classifier import Precision


@contextmanager
def numerics(precision: Precision, deterministic: bool) -> Iterator[None]:
    """Set torch's switches for CUDA and put them back; on a CPU they have no effect.

    Without this, convolutions of float32 run in TF32, with 10 bits of mantissa, and cuDNN may choose another
    algorithm, so another sum, each time.
    """
    cudnn: Any = torch.backends.cudnn  # torch makes some of its attributes when it is imported
    conv, matmul = cudnn.conv, torch.backends.cuda.matmul
    before = (cudnn.deterministic, cudnn.benchmark, conv.fp32_precision, matmul.fp32_precision)
    tensor_cores = "tf32" if precision == "tf32" else "ieee"
    cudnn.deterministic, cudnn.benchmark = deterministic, not deterministic
    conv.fp32_precision = matmul.fp32_precision = tensor_cores
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, conv.fp32_precision, matmul.fp32_precision = before


@contextmanager
def serving(threads: int, precision: Precision, deterministic: bool) -> Iterator[None]:
    """As the server computes: its threads, and a GPU's switches; both are put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with numerics(precision, deterministic):
            yield
    finally:
        torch.set_num_threads(before)
