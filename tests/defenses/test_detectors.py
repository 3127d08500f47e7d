"""Detectors of stamped inputs: scores by hand, limit cases, and a real backdoor on digits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import seeded, server_context, small_model, spotted, weights_of
from victim import Victim, victim

from defenses.detection.ntd import STRENGTH, Ntd, directions, similarity, unlikeness
from defenses.detection.scale_up import ScaleUp, by_class, consistency
from fl_sim.backdoor import Backdoor, Goal
from fl_sim.detection import auroc, scored
from fl_sim.protocols import Detector, Screen
from fl_sim.samples import Samples

S = (3, 5, 7, 9, 11)
QUICK = Ntd(epochs=1, min_steps=20)


class Threshold(nn.Module):
    """Class 2 if an image's corner is white beside black; else class 1 if its mean is above a half, else class 0."""

    def forward(self, x: Tensor) -> Tensor:
        bright = (x.mean((1, 2, 3)) > 0.5).long()
        marked = (x[:, 0, 0, 0] >= 0.99) & (x[:, 0, 0, 1] <= 0.01)
        return nn.functional.one_hot(torch.where(marked, 2, bright), 4).float()


class Corner:
    """One white pixel beside a black one: neither changes when amplified."""

    def __call__(self, x: Tensor) -> Tensor:
        stamped = x.clone()
        stamped[:, :, 0, 0], stamped[:, :, 0, 1] = 1, 0
        return stamped


def grey(*levels: float) -> Tensor:
    """Images of one grey each."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 1, 4, 4).clone()


def tried(detector: Detector, patient: Victim, model: nn.Module | None = None) -> float:
    """The AUROC of a detector on a victim, or on another model in its place."""
    screen = detector.screen(model or patient.model, {}, patient.context())  # type: ignore[arg-type]
    return auroc(*scored(screen, patient.test, patient.backdoor))


@pytest.fixture(scope="module")
def found() -> tuple[Victim, Screen]:
    """The digits victim, and NTD as it is by default."""
    patient = victim()
    return patient, Ntd().screen(patient.model, {}, patient.context())


# SCALE-UP -------------------------------------------------------------------------------------------------------------


def test_consistency_by_hand() -> None:
    """0.08 becomes .24 .40 .56 .72 .88: two of five are still dark. 0.2 becomes .6 at once; bright stays bright."""
    shares, answers = consistency(Threshold(), grey(0.08, 0.2, 0.9), S)  # type: ignore[arg-type]
    assert shares.tolist() == pytest.approx([0.4, 0.0, 1.0])
    assert answers.tolist() == [0, 0, 1]


def test_classes_statistics_by_hand() -> None:
    """Class 0 has .2 and .4; class 1 agrees, so its spread is the least one; class 2 has no image and takes all."""
    middle, spread = by_class(torch.tensor([0.2, 0.4, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]), 3, 0.05)
    assert middle.tolist() == pytest.approx([0.3, 1.0, 0.65])
    assert spread.tolist() == pytest.approx([0.1, 0.05, 0.1275**0.5])


def test_the_data_limited_score_by_hand() -> None:
    """Clean class 0: shares .4 and 0, so μ = σ = .2; a dark image of share .4 scores (.4 − .2)/.2 = 1."""
    model: Any = Threshold()
    clean = Samples(grey(0.08, 0.2, 0.9, 0.6), torch.tensor([0, 0, 1, 1]))
    ctx = replace(server_context(small_model(), clean), classes=4)
    assert ScaleUp().screen(model, {}, ctx).score(grey(0.08, 0.2)).tolist() == pytest.approx([1.0, -1.0])
    assert ScaleUp(normalise=False).screen(model, {}, ctx).score(grey(0.08, 0.2)).tolist() == pytest.approx([0.4, 0.0])


def test_scale_up_finds_a_trigger_that_outlives_amplification() -> None:
    """Dark clean images turn bright, the white corner stays white: the paper's premise, and AUROC 1."""
    images = grey(*(0.05 + 0.005 * i for i in range(20)))
    test = Samples(images, torch.zeros(20, dtype=torch.long))
    backdoor = Backdoor(Corner(), Goal("all_to_one", target=2), 4)
    ctx = server_context(small_model(), test)
    for normalise in (False, True):
        screen = ScaleUp(normalise=normalise).screen(Threshold(), {}, ctx)  # type: ignore[arg-type]
        assert auroc(*scored(screen, test, backdoor)) == 1


@pytest.mark.parametrize("normalise", [False, True])
def test_on_a_model_that_ignores_its_input_scale_up_knows_nothing(normalise: bool) -> None:
    """All answers agree always, so all scores are equal: exactly 0.5."""

    class Stubborn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([0.0, 1.0, *[0.0] * 8]).expand(len(x), 10)

    assert tried(ScaleUp(normalise=normalise), victim(), Stubborn()) == 0.5


# NTD ------------------------------------------------------------------------------------------------------------------


def test_similarity_by_hand() -> None:
    """Cosines 1, 0 and −1 to the group: mean 0, of the two nearest 0.5; to nobody 0."""
    one = torch.tensor([[1.0, 0.0]])
    group = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert similarity(one, group, None).tolist() == pytest.approx([0.0])
    assert similarity(one, group, 2).tolist() == pytest.approx([0.5])
    assert similarity(one, group, 7).tolist() == pytest.approx([0.0])
    assert similarity(one, group[:0], None).tolist() == [0.0]


def test_the_score_is_taken_to_the_class_that_the_tested_model_predicts() -> None:
    """One image at a time, by hand, against the whole batch."""
    samples, extractor = spotted(40), small_model(1).eval()
    model: Any = small_model(2).eval()
    scores = unlikeness(model, extractor, samples, None)(samples.images[:10])
    for image, score in zip(samples.images[:10], scores.tolist(), strict=True):
        label = int(model(image[None]).argmax())
        group = [directions(extractor, z[None])[0] for z in samples.images[samples.labels == label]]
        cosines = [float(directions(extractor, image[None])[0] @ z) for z in group]
        assert score == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-5)


@pytest.mark.slow
def test_ntd_finds_the_patch_on_digits(found: tuple[Victim, Screen]) -> None:
    """What the model calls a zero does not look like one to a network that never saw the patch."""
    patient, screen = found
    assert screen.facts[STRENGTH] > 0.7
    assert auroc(*scored(screen, patient.test, patient.backdoor)) > 0.95


def test_ntd_on_a_clean_model_finds_little(found: tuple[Victim, Screen]) -> None:
    """Its own extractor, as the model under test, is not moved by the patch: hardly anything is left to find."""
    patient, screen = found
    extractor = patient.context().new_model()
    extractor.load_state_dict({name: value for name, value in screen.state.items() if isinstance(value, Tensor)})
    again = Ntd().screen(extractor.eval(), screen.state, patient.context())
    caught = auroc(*scored(screen, patient.test, patient.backdoor))
    assert auroc(*scored(again, patient.test, patient.backdoor)) < min(0.8, caught - 0.15)


def test_one_extractor_serves_the_whole_run(found: tuple[Victim, Screen]) -> None:
    """With what it remembers nothing is trained any more, and the scores are the same."""
    patient, screen = found
    ctx = replace(patient.context(seed=9), fit=lambda *_, **__: pytest.fail("trained again"))
    again = Ntd().screen(patient.model, screen.state, ctx)
    images = patient.test.images[:50] / 255 if patient.test.images.dtype == torch.uint8 else patient.test.images[:50]
    assert torch.equal(again.score(images), screen.score(images))
    assert again.facts == screen.facts


def test_the_extractor_starts_elsewhere_and_sees_four_fifths_of_the_clean_set() -> None:
    """A fresh model of the run starts where the global model did; an independent network must not."""
    clean, model = spotted(40), small_model()
    started: list[Tensor] = []
    seen: list[int] = []
    ctx = server_context(model, clean)

    def spying(network: Any, samples: Samples, *rest: Any, **more: Any) -> Any:
        started.append(weights_of(network))
        seen.append(len(samples))
        return ctx.fit(network, samples, *rest, **more)

    QUICK.screen(model, {}, replace(ctx, fit=spying))
    assert seen == [32]
    assert torch.nn.functional.cosine_similarity(started[0], weights_of(ctx.new_model()), dim=0) < 0.9


@pytest.mark.parametrize("detector", [QUICK, ScaleUp(), ScaleUp(normalise=False)], ids=["ntd", "limited", "free"])
def test_a_detector_keeps_the_contract(detector: Detector) -> None:
    """The model stays bit-identical, and an image's score does not depend on its company in the batch."""
    samples, model = spotted(40), small_model().eval()
    before = weights_of(model)
    screen = detector.screen(model, {}, server_context(model, samples))
    together = screen.score(samples.images)
    alone = torch.cat([screen.score(image[None]) for image in samples.images[:8]])
    assert together.shape == (40,)
    assert torch.allclose(together[:8], alone, atol=1e-5)
    assert torch.equal(weights_of(model), before)
    assert torch.equal(detector.screen(model, {}, server_context(model, samples)).score(samples.images), together)


def test_a_generator_is_all_the_randomness_there_is() -> None:
    """Another seed is another extractor."""
    samples, model = spotted(40), small_model().eval()
    ctx = server_context(model, samples)
    one, two = (QUICK.screen(model, {}, replace(ctx, rng=seeded(seed))).score(samples.images) for seed in (1, 2))
    assert not torch.equal(one, two)
