"""Scores of models whose every prediction is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from toys import seeded, small_model, spotted, white_backdoor

from clients.triggers.badnets import BadNets
from fl_sim.backdoor import Backdoor, Goal, Rule
from fl_sim.data.digits import Digits
from fl_sim.metrics import accuracy, defense_effectiveness, evaluate, is_finite, wilson
from fl_sim.models.classifier import build_classifier
from fl_sim.models.cnn import Cnn
from fl_sim.rounds import detection_rates
from fl_sim.samples import Samples
from fl_sim.training import fit, sgd


class LastPixel:
    """A trigger that sets only the last pixel."""

    def __call__(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[..., -1] = 1.0
        return x


class Scripted(nn.Module):
    """Reads its answers off the image: pixel 0 says what to predict, pixel 1 what to predict once stamped.

    The logits are 4 for the answer and 0 for the two others.
    """

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(1)
        answer = torch.where(pixels[:, -1] > 0.5, pixels[:, 1], pixels[:, 0])
        return 4 * nn.functional.one_hot((answer * 10).round().long(), 3).float()


def script(labels: list[int], clean: list[int], stamped: list[int]) -> Samples:
    images = torch.zeros(len(labels), 1, 1, 3)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.tensor(clean) / 10, torch.tensor(stamped) / 10
    return Samples(images, torch.tensor(labels))


def last_pixel(rule: Rule = "all_to_one", target: int = 0, source: int = 1) -> Backdoor:
    return Backdoor(LastPixel(), Goal(rule, target, source), 3)


EXAMPLE = script(labels=[0, 0, 1, 1, 2, 2], clean=[0, 1, 1, 2, 2, 2], stamped=[0, 0, 0, 1, 0, 1])
RIGHT = math.log(1 + 2 * math.exp(-4))
"""The loss of a right answer, −log(e⁴/(e⁴ + 2)); a wrong one costs 4 more."""


@pytest.mark.parametrize("chunk", [1, 2, 4, 512])
def test_all_to_one_by_hand(chunk: int) -> None:
    """Clean: 4 of 6 right. Victims are the four of class 1 and 2: clean 3 of 4 right; stamped 0 1 0 1: 2 of 4 obey,
    one is still right. The two of class 0, though predicted 0, don't count. Loss: 6·RIGHT + 2·4, over 6."""
    score = evaluate(Scripted(), EXAMPLE, last_pixel(), chunk=chunk)
    assert score.acc == pytest.approx(4 / 6)
    assert score.acc_non_target == pytest.approx(3 / 4)
    assert score.asr == pytest.approx(2 / 4)
    assert score.ra == pytest.approx(1 / 4)
    assert score.loss == pytest.approx(RIGHT + 8 / 6, rel=1e-6)
    assert (score.asr_low, score.asr_high) == pytest.approx(wilson(2, 4))
    assert score.asr_unstamped == 0
    fields = {"acc", "asr", "asr_low", "asr_high", "asr_unstamped", "acc_non_target", "ra", "loss"}
    assert set(score.fields()) == fields


def test_all_to_all_by_hand() -> None:
    """Wanted 1 1 2 2 0 0, stamped 0 0 0 1 0 1: one of six obeys; right once stamped: the two 0s and one 1, 3 of 6."""
    score = evaluate(Scripted(), EXAMPLE, last_pixel("all_to_all"))
    assert score.asr == pytest.approx(1 / 6)
    assert score.ra == pytest.approx(3 / 6)
    assert score.acc_non_target == score.acc == pytest.approx(4 / 6)


def test_source_specific_by_hand() -> None:
    """Source 2: its two images, stamped, give 0 and 1: one of two obeys, none is right. Without the target class
    there are still the four images of class 1 and 2, 3 of them right."""
    score = evaluate(Scripted(), EXAMPLE, last_pixel("source_specific", target=0, source=2))
    assert score.asr == pytest.approx(1 / 2)
    assert score.ra == 0.0
    assert score.acc_non_target == pytest.approx(3 / 4)


def test_clean_label_attacks_are_scored_like_all_to_one() -> None:
    assert evaluate(Scripted(), EXAMPLE, last_pixel("clean_label")) == evaluate(Scripted(), EXAMPLE, last_pixel())


def test_a_test_set_of_the_target_class_alone_has_no_asr() -> None:
    score = evaluate(Scripted(), EXAMPLE[:2], last_pixel())
    assert score.acc == 0.5
    assert [score.asr, score.asr_low, score.asr_high, score.acc_non_target, score.ra] == [None] * 5


def test_a_test_set_without_the_source_class_has_no_asr_but_an_acc_non_target() -> None:
    score = evaluate(Scripted(), EXAMPLE[:4], last_pixel("source_specific", target=0, source=2))
    assert score.asr is None
    assert score.acc_non_target == pytest.approx(1 / 2)


def test_scores_do_not_depend_on_how_images_are_stored() -> None:
    images = EXAMPLE.images.mul(255).round().to(torch.uint8)
    assert evaluate(Scripted(), Samples(images, EXAMPLE.labels), last_pixel()) == evaluate(
        Scripted(), EXAMPLE, last_pixel()
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_and_the_statistics_are_left_as_they_were(training: bool) -> None:
    model = small_model().train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, spotted(16), white_backdoor())
    accuracy(model, spotted(16))
    assert model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_accuracy_by_hand() -> None:
    assert accuracy(Scripted(), EXAMPLE, chunk=4) == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (5, 10, 0.2366, 0.7634),
        (1, 10, 0.0179, 0.4042),
        (0, 10, 0.0, 0.2775),  # z²/(n + z²) = 3.8415/13.8415
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson_against_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_exact_at_none_and_all_and_never_leaves_the_unit_interval() -> None:
    for trials in (1, 3, 7, 360, 9000):
        assert wilson(0, trials)[0] == 0.0
        assert wilson(trials, trials)[1] == 1.0
        for successes in (0, 1, trials // 2, trials):
            low, high = wilson(successes, trials)
            assert 0 <= low <= successes / trials <= high <= 1


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.9, 1.0), (0.9, 0.0), 1.0),  # all of the attack gone, nothing lost: (1 − 0 + 1)/2
        ((0.9, 1.0), (0.9, 1.0), 0.5),  # nothing happened
        ((0.9, 1.0), (0.8, 0.2), 0.85),  # (0.8 − 0.1 + 1)/2
        ((0.9, 0.5), (0.95, 0.7), 0.5),  # gains in ACC and rises of ASR count as zero
        ((1.0, 0.0), (0.0, 0.0), 0.0),
    ],
)
def test_defense_effectiveness(before: tuple[float, float], after: tuple[float, float], expected: float) -> None:
    assert defense_effectiveness(*before, *after) == pytest.approx(expected)


def test_is_finite() -> None:
    assert is_finite(torch.zeros(3))
    assert not is_finite(torch.tensor([0.0, math.nan]))
    assert not is_finite(torch.tensor([0.0, -math.inf]))


def test_detection_rates_by_hand() -> None:
    """Two attackers, one rejected: 1/2. Four honest clients, one rejected: 1/4."""
    attacking = [True, True, False, False, False, False]
    rejected = [True, False, True, False, False, False]
    assert detection_rates(attacking, rejected) == {"tpr": 0.5, "fpr": 0.25}
    assert detection_rates([False, False], [False, True]) == {"fpr": 0.5}
    assert detection_rates([True], [True]) == {"tpr": 1.0}


def test_a_clean_model_hardly_obeys_a_trigger() -> None:
    """Trained on clean images only, and shown a stamped last row of pixels that no class uses: with four classes
    chance is 1/4 over all targets together, since every stamped image is taken for something."""
    train, test = spotted(160), spotted(80)
    model = small_model()
    fit(model, train, sgd(model, 0.05, momentum=0.9), epochs=5, batch_size=16, rng=seeded())

    class LastRow:
        def __call__(self, x: Tensor) -> Tensor:
            x = x.clone()
            x[:, :, -1] = 0.5
            return x

    scores = [evaluate(model, test, Backdoor(LastRow(), Goal(target=target), 4)) for target in range(4)]
    assert scores[0].acc > 0.95
    asrs = [score.asr for score in scores if score.asr is not None]
    assert len(asrs) == 4
    assert sum(asrs) / 4 < 0.25


def test_an_untrained_models_asr_over_all_targets_is_chance() -> None:
    """Every image is predicted as some class and counts for three of four targets. If p is the share of images whose
    prediction is wrong, the four ASRs sum to 4p/3 ≤ 4/3: on average at most 1/3, whatever the weights."""
    test = spotted(80)
    asrs = [evaluate(small_model(), test, Backdoor(LastPixel(), Goal(target=t), 4)).asr for t in range(4)]
    assert sum(asr for asr in asrs if asr is not None) <= 4 / 3 + 1e-9
    robust = evaluate(small_model(), test, Backdoor(LastPixel(), Goal("all_to_all"), 4)).ra
    assert robust is not None
    assert sum(asr for asr in asrs if asr is not None) == pytest.approx(4 / 3 * (1 - robust))


def test_a_clean_model_of_the_digits_has_an_asr_near_chance_or_below() -> None:
    """Among nine classes of victims, what a trained model takes for the target by mistake is well below 1/5, for any
    target: a stamp that nobody has trained is a small disturbance."""
    data, facts = Digits().load(), Digits().facts
    model = build_classifier(Cnn(8), facts.shape, 10, facts.mean, facts.std, seeded())
    fit(model, data.train, sgd(model, 0.1, momentum=0.9), epochs=5, batch_size=32, rng=seeded())
    for target in range(10):
        score = evaluate(model, data.test, Backdoor(BadNets(), Goal(target=target), 10))
        assert score.acc > 0.95
        assert score.asr is not None
        assert score.asr < 0.2


class Answers(nn.Module):
    """Takes an image for the class that its first pixel names, in tenths."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot((x[:, 0, 0, 0] * 10).round().long(), 4).float()


def answered(answers: list[int], labels: list[int]) -> Samples:
    pixels = torch.tensor(answers).view(-1, 1, 1, 1) / 10
    return Samples(pixels.expand(-1, 1, 2, 2).clone(), torch.tensor(labels))


def test_accuracy_of_each_class_by_hand() -> None:
    """Class 0: one of two right; class 1: both; class 2: none of one; class 3 has no image."""
    test = answered([0, 1, 1, 1, 0], [0, 0, 1, 1, 2])
    backdoor = Backdoor(LastPixel(), Goal(target=0), 4)
    assert evaluate(Answers(), test, backdoor, per_class=True, chunk=2).acc_per_class == (0.5, 1.0, 0.0, None)
    assert "acc_per_class" not in evaluate(Answers(), test, backdoor).fields()


def test_a_collapsed_model_is_told_from_an_obedient_one() -> None:
    """Victims are the three images of classes 1 and 2. The trigger of the first model is unknown to it: what it takes
    for the target it takes so without a stamp too (2 of 3); one that answers 0 to everything has ASR 1 either way."""
    test = answered([0, 0, 1, 0], [0, 1, 1, 2])
    backdoor = Backdoor(LastPixel(), Goal(target=0), 4)
    score = evaluate(Answers(), test, backdoor)
    assert score.asr_unstamped == pytest.approx(2 / 3)
    collapsed = evaluate(Answers(), answered([0] * 4, [0, 1, 1, 2]), backdoor)
    assert (collapsed.asr, collapsed.asr_unstamped) == (1.0, 1.0)


def test_rules_by_hand() -> None:
    """Stamped images keep the model's answer here. all_to_all: success is y+1: answers 1, 2, 0 for 0, 1, 3 succeed
    and 2 for 2 does not, over all four. source_specific 2 → 1: of the two images of class 2, one answers 1."""
    everyone = evaluate(Answers(), answered([1, 2, 2, 0], [0, 1, 2, 3]), Backdoor(LastPixel(), Goal("all_to_all"), 4))
    assert everyone.asr == 0.75
    goal = Goal("source_specific", target=1, source=2)
    one = evaluate(Answers(), answered([1, 1, 2, 1], [0, 2, 2, 3]), Backdoor(LastPixel(), goal, 4))
    assert one.asr == 0.5
