"""How much memory each rule needs beside the stack of updates: at most as much again."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_aggregation_all import NAMES, rule_of
from toys import seeded, server_context, small_model, spotted

from fl_sim.layout import Layout
from fl_sim.models.classifier import Classifier
from fl_sim.models.cnn import Cnn
from fl_sim.packing import ThisMachine, forget_peak

CLEAR = Path("/proc/self/clear_refs")
CLIENTS, MIB = 100, 1 << 20
SLACK = 64 * MIB
"""Parts of a pass (16 MiB, and what sorting makes of one), a model, images, and libraries' own."""
WORK = {
    "deepsight": {"samples": 500, "draws": 2},
    "indicator": {"samples": 40, "epochs": 1},
    "fldetector": {"window": 3},
}


def wide_model() -> Classifier:
    return small_model(architecture=Cnn(width=64))


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR.exists(), reason="the peak can be measured on Linux only")
@pytest.mark.parametrize("name", NAMES)
def test_no_rule_needs_more_than_another_copy_of_the_stack(name: str) -> None:
    """100 clients × 370,000 parameters are 150 MB; the peak of two rounds is compared with what was there before."""
    model = wide_model()
    columns = Layout.of(model).parameters
    stack = CLIENTS * columns * 4
    assert stack > 2 * SLACK
    rule = rule_of(name, **WORK.get(name, {}))
    ctx = server_context(model, spotted(24), clients=CLIENTS, assumed_attackers=20)
    ctx = replace(ctx, new_model=wide_model)
    few = replace(ctx, clients=ctx.clients[:5], assumed_attackers=1)
    rule.aggregate(0.01 * torch.randn(5, columns, generator=seeded()), torch.full((5,), 0.2), {}, few)
    deltas = torch.randn(CLIENTS, columns, generator=seeded()).mul_(0.01)
    weights = torch.full((CLIENTS,), 1 / CLIENTS)
    gc.collect()
    forget_peak()
    before, _ = ThisMachine().held(os.getpid())
    result = rule.aggregate(deltas, weights, {}, ctx)
    rule.aggregate(deltas, weights, result.state, replace(ctx, round=2))
    extra = ThisMachine().held(os.getpid())[1] - before
    print(f"{name}: {extra / stack:.2f} of the stack")
    copies = 3 if name == "flower" else 1  # Flower's own, of a model of which one layer is four fifths
    assert extra <= copies * stack + SLACK
