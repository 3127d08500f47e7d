"""Ratios that hold on any machine, with room to spare: what slows everything down by half is noticed here.

Each pair is timed in turn in this process, by the processor's clock, and the fastest of several tries counts.
`benchmarks/` has the measurements proper.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the benchmarks importable."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def fastest_round(way: str, *overrides: str) -> float:
    """CPU seconds of the fastest of five rounds; the first and the last do more and are left out."""
    import engines

    from fl_sim.composing import compose_config

    config = compose_config([*engines.CASES["digits"], *engines.WAYS[way], *overrides, "rounds=7"])
    ended = engines.bare(config) if way == "bare" else engines.simulated(config)
    return min(after.ended_cpu - before.begins_cpu for before, after in pairwise(ended[:-1]))


def holds(ratio: Callable[[], float], limit: float) -> bool:
    """Whether a ratio is below its limit in one of three tries: what else the machine does only ever adds."""
    return any(ratio() < limit for _ in range(3))


FEW = "clients=16", "clients_per_round=16", "data.subset=0.16"
"""Of 13 digits each."""


@pytest.mark.usefixtures("benchmarks")
def test_a_round_costs_little_more_than_its_arithmetic() -> None:
    """A bare PyTorch loop beside it: about 1.15 on an idle machine."""
    assert holds(lambda: fastest_round("inprocess_1", *FEW) / fastest_round("bare", *FEW), 1.5)


@pytest.mark.usefixtures("benchmarks")
def test_small_clients_gain_by_training_together() -> None:
    """Stacks of 16 against one by one: about 0.65."""
    stacked = *FEW, "engine.clients=16", "engine.workers=1"
    assert holds(lambda: fastest_round("batched", *stacked) / fastest_round("inprocess_1", *FEW), 0.95)


@pytest.mark.usefixtures("benchmarks")
def test_who_is_not_asked_costs_nothing() -> None:
    """Ten of 5,000 clients a round against ten of 50: about 1."""
    tiny = "data=synthetic", "data.image_size=8", "data.channels=1", "data.augment.crop=0", "clients_per_round=10"

    def seconds(clients: int) -> float:
        samples = f"data.samples={round(4 * clients / 0.95) + 1}"
        return fastest_round("inprocess_1", *tiny, f"clients={clients}", samples)

    assert holds(lambda: seconds(5000) / seconds(50), 1.6)


@pytest.mark.usefixtures("benchmarks")
def test_scoring_takes_two_forward_passes() -> None:
    """ACC and ASR against one plain pass over the test set: below 2, as images of the target class stay unstamped."""
    import evaluation

    assert holds(lambda: evaluation.measured(evaluation.CASES["digits"], repeats=5)["ratio"], 2.4)
