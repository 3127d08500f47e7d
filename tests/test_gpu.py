"""What only a GPU can show. Skipped without one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import tiny
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    """`engine.deterministic=true`, the default, with attackers, erasing and augmentation."""
    words = (*tiny.ERASING, "device=cuda", "client.augment=true")
    first, second = tiny.run(tmp_path / "first", *words), tiny.run(tmp_path / "second", *words)
    assert tiny.numbers(first) == tiny.numbers(second)


@pytest.mark.parametrize("attack", ["none", "model_replacement"])
def test_a_gpu_run_is_the_cpu_run_up_to_rounding(tmp_path: Path, attack: str) -> None:
    """Every draw comes from CPU generators, so cohorts, batches, poisoned samples and augmentation are the same; after
    one round the losses agree to float32's rounding, grown through a few steps of training."""
    words = (f"attack={attack}", "rounds=1", "client.augment=true")
    here, there = tiny.run(tmp_path / "cpu", *words, "device=cpu"), tiny.run(tmp_path / "cuda", *words, "device=cuda")
    [cpu], [gpu] = tiny.events(here, "round"), tiny.events(there, "round")
    assert cpu["loss"] == pytest.approx(gpu["loss"], rel=1e-3)
    assert cpu["train_loss"] == pytest.approx(gpu["train_loss"], rel=1e-3)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_lower_precision_trains_too(tmp_path: Path, precision: str) -> None:
    """Near the float32 losses, and not equal to them: the switch has an effect."""
    exact = tiny.run(tmp_path / "exact", "device=cuda", "rounds=1")
    rough = tiny.run(tmp_path / "rough", "device=cuda", "rounds=1", f"engine.precision={precision}")
    losses = [tiny.events(folder, "round")[0]["train_loss"] for folder in (exact, rough)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert precision == "tf32" or losses[0] != losses[1]


def test_a_run_resumes_on_the_gpu(tmp_path: Path) -> None:
    """From a checkpoint that was written from GPU tensors."""
    from fl_sim import execution

    words = (*tiny.ERASING, "device=cuda", "server_optimizer=momentum", "server_optimizer.lr=0.5", "rounds=4")
    whole = tiny.run(tmp_path / "whole", *words)
    from fl_sim.rounds import Federation

    save = Federation._save

    def ending(self: Federation, t: int) -> None:
        save(self, t)
        if t == 2:
            raise KeyboardInterrupt

    (tmp_path / "cut").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "_save", ending)
        with pytest.raises(KeyboardInterrupt):
            execution.start(tiny.tiny(*words), tmp_path / "cut", [])
    execution.resume(tmp_path / "cut")
    assert tiny.numbers(tmp_path / "cut") == tiny.numbers(whole)


BATCHED = ("device=cuda", "engine=batched", "engine.clients=4", "client.augment=true")


def test_clients_train_together_on_the_gpu_as_alone(tmp_path: Path) -> None:
    """Stacked on the GPU against one by one on the GPU: all four together, the same losses up to rounding."""
    together = tiny.run(tmp_path / "together", *BATCHED, "rounds=1")
    alone = tiny.run(tmp_path / "alone", "device=cuda", "client.augment=true", "rounds=1")
    [ours], [theirs] = tiny.events(together, "round"), tiny.events(alone, "round")
    assert ours["batched"] == 4
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_bits_to_clients_trained_together(tmp_path: Path, precision: str) -> None:
    words = (*tiny.ERASING, *BATCHED, f"engine.precision={precision}")
    assert tiny.numbers(tiny.run(tmp_path / "first", *words)) == tiny.numbers(tiny.run(tmp_path / "second", *words))


def test_stacked_training_never_waits_for_the_gpu() -> None:
    """No step reads a number back: not even where PyTorch makes an error of it."""
    from toys import seeded, small_model, spotted

    from fl_sim.together import training
    from fl_sim.training import sgd

    jobs = []
    for place, size in enumerate((20, 9, 5)):
        model, samples = small_model().cuda(), spotted(size, dtype=torch.uint8)
        own = type(samples)(samples.images.cuda(), samples.labels.cuda())
        jobs.append(training.Job(place, model, own, sgd(model, 0.1), epochs=2, batch_size=8, rng=seeded(place)))
    stepping = training._Training(jobs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2):
            stepping._step(step, [next(draw) for draw in stepping._draws])
    finally:
        torch.cuda.set_sync_debug_mode("default")


CAPTURED = ("device=cuda", "engine=inprocess", "engine.capture=true", "client.augment=true", "client.batch_size=4")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("attack", ["none", "model_replacement"])
def test_recorded_steps_give_the_numbers_of_others(tmp_path: Path, attack: str, precision: str) -> None:
    """The same bits in every run; those of other steps up to rounding, with momentum and changing learning rates."""
    words = (f"attack={attack}", "client.momentum=0.9", "client.schedule=cosine", f"engine.precision={precision}")
    first, second = (tiny.run(tmp_path / name, *words, *CAPTURED) for name in ("first", "second"))
    assert tiny.numbers(first) == tiny.numbers(second)
    plain = tiny.run(tmp_path / "plain", *words, *CAPTURED, "engine.capture=false")
    ours, theirs = (tiny.events(folder, "round")[0]["train_loss"] for folder in (first, plain))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_local_training_never_waits_for_the_gpu() -> None:
    """Batches, augmentation and steps by `fit` and by recorded steps; only the loss is read, at the end."""
    from toys import seeded, small_model, spotted

    from fl_sim.augment import Augment
    from fl_sim.captured import Captured
    from fl_sim.training import fit, sgd

    samples = spotted(40, dtype=torch.uint8)
    own = type(samples)(samples.images.cuda(), samples.labels.cuda()).then(Augment(crop=1, flip=True, cutout=2))
    for train in (fit, Captured()):
        model = small_model().cuda()
        train(model, own, sgd(model, 0.1), epochs=3, batch_size=8, rng=seeded())  # warms up, and records
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train(model, own, sgd(model, 0.1), epochs=3, batch_size=8, rng=seeded())
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert sum("synchroniz" in str(each.message) for each in said) <= 1
