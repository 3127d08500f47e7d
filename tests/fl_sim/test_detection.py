"""How detectors are judged: AUROC by ranks, its interval, whose images count, and that nothing leaks or is lost."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn
from toys import White, seeded, server_context, small_model, spotted, weights_of, white_backdoor

from fl_sim import central, execution
from fl_sim import detection as module
from fl_sim.backdoor import Backdoor, Goal
from fl_sim.build import build
from fl_sim.cli import OK, main
from fl_sim.composing import compose_config
from fl_sim.detection import Screening, auroc, auroc_interval, measured, scored, tpr_at
from fl_sim.errors import ConfigError
from fl_sim.protocols import Screen, ServerContext, State
from fl_sim.samples import Samples

QUICK = (*tiny.TINY, "central.epochs=1", "central.batch_size=32")


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def log(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event} | fields)


class Brightness:
    """A detector that looks at pixels only; remembers how often it was asked, and every context."""

    def __init__(self) -> None:
        self.contexts: list[ServerContext] = []
        self.draws: list[int] = []

    def screen(self, model: nn.Module, state: State, ctx: ServerContext) -> Screen:
        self.contexts.append(ctx)
        self.draws.append(int(torch.randint(1000, (1,), generator=ctx.rng)))
        asked = int(state.get("asked", 0)) + 1
        return Screen(lambda x: x.mean((1, 2, 3)), {"asked": asked}, {"asked": asked})


@dataclass(frozen=True)
class Bright:
    """A natural trigger: whoever is bright carries it."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def selects(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3)) > 0.5


# The numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [2, 6, 1000])
def test_auroc_and_tpr_are_scikit_learns(seed: int, levels: int) -> None:
    """With hardly any ties and with almost nothing but ties, groups of different sizes."""
    rng = seeded(seed)
    clean = torch.randint(levels, (57,), generator=rng).double()
    stamped = torch.randint(levels, (91,), generator=rng).double() + levels // 4
    truth = [0] * len(clean) + [1] * len(stamped)
    scores = torch.cat([clean, stamped]).numpy()
    assert auroc(clean, stamped) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    wrongs, rights, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert tpr_at(clean, stamped, 0.05) == pytest.approx(rights[wrongs <= 0.05].max(), abs=1e-12)


def test_auroc_by_hand() -> None:
    """Of the six pairs of (1, 2) and (1, 2, 3) three are right, two are ties: (3 + 1)/6."""
    one, two, three = (torch.tensor(values) for values in ([1.0, 2.0], [1.0, 2.0, 3.0], [5.0, 6.0]))
    assert auroc(one, two) == pytest.approx(4 / 6)
    assert (auroc(one, three), auroc(three, one), auroc(one, one)) == (1, 0, 0.5)


@pytest.mark.parametrize(("share", "clean", "stamped"), [(0.7, 40, 60), (0.5, 10, 10), (0.97, 323, 323)])
def test_the_intervals_ends_solve_newcombes_equation(share: float, clean: int, stamped: int) -> None:
    """|AUROC − θ| = 1.96·√V(θ) at both ends."""
    h = (clean + stamped) / 2 - 1
    for theta in auroc_interval(share, clean, stamped):
        spread = theta * (1 - theta) * (1 + h * (1 - theta) / (2 - theta) + h * theta / (1 + theta))
        assert abs(share - theta) == pytest.approx(1.959964 * math.sqrt(spread / (clean * stamped)), rel=1e-6)


def test_the_interval_of_a_perfect_detector_has_a_width() -> None:
    """And it narrows with more images; of the mirrored AUROC it is the mirror image."""
    low, high = auroc_interval(1.0, 20, 20)
    assert high == 1
    assert 0.7 < low < auroc_interval(1.0, 200, 200)[0] < 1
    assert auroc_interval(0.0, 20, 20) == pytest.approx((0, 1 - low))


def test_where_there_is_no_auroc_the_reason_is_said() -> None:
    """No image, or a score that is no number: null, not 0.5."""
    good = torch.tensor([0.0, 1.0])
    assert measured(good, good)["auroc"] == 0.5
    for clean, stamped, reason in ((good, good[:0], "no images"), (good * math.nan, good, "NaN")):
        result = measured(clean, stamped)
        assert result["auroc"] is None
        assert reason in result["reason"]
        assert (result["clean"], result["stamped"]) == (2, len(stamped))


# Whose images count ---------------------------------------------------------------------------------------------------


def test_the_images_are_those_that_asr_counts_with_and_without_the_trigger() -> None:
    """Thirty of forty are not of the target class; unstamped they keep their brightness, stamped they are white."""
    test = spotted(40)
    screen = Screen(lambda x: x.mean((1, 2, 3)))
    clean, stamped = scored(screen, test, white_backdoor(target=2))
    assert torch.equal(clean, test.images[test.labels != 2].mean((1, 2, 3)).double())
    assert torch.equal(stamped, torch.ones(30, dtype=torch.float64))


def test_a_natural_triggers_clean_images_lack_it() -> None:
    """Stamping changes nothing there: the same images would be both clean and stamped."""
    images = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7]).view(5, 1, 1, 1).expand(5, 1, 2, 2).clone()
    test = Samples(images, torch.tensor([1, 1, 1, 1, 2]))
    backdoor = Backdoor(Bright(), Goal("source_specific", target=0, source=1), 3)
    clean, stamped = scored(Screen(lambda x: x[:, 0, 0, 0]), test, backdoor)
    assert clean.tolist() == pytest.approx([0.1, 0.2])
    assert stamped.tolist() == pytest.approx([0.9, 0.8])


def test_a_detector_is_told_no_test_image_and_disturbs_nothing() -> None:
    """Its context is the server's, clean set and all; the model comes back in its mode, bit for bit."""
    model, test, clean = small_model().train(), spotted(40), spotted(20)
    detector, tracker = Brightness(), Kept()
    screening = Screening({"brightness": detector}, test, 0, tracker)
    before = weights_of(model)
    screening.inspect("first", model, white_backdoor(), server_context(model, clean))
    [ctx] = detector.contexts
    assert ctx.clean is clean
    held = [value for field in fields(ctx) if isinstance(value := getattr(ctx, field.name), Samples)]
    assert held == [clean]
    assert torch.equal(ctx.vector, before)
    assert torch.equal(weights_of(model), before)
    assert model.training
    [event] = tracker.events
    assert (event["event"], event["model"], event["detector"], event["auroc"]) == (
        "detection",
        "first",
        "brightness",
        1,
    )


def test_what_a_detector_remembers_goes_to_the_next_model_and_what_it_draws_is_alike() -> None:
    """So an extractor that it trains is trained once, and does not depend on which model came first."""
    detector, tracker = Brightness(), Kept()
    screening = Screening({"brightness": detector}, spotted(40), 0, tracker, [{"model": "a", "detector": "brightness"}])
    model = small_model()
    for name in "abc":
        screening.inspect(name, model, white_backdoor(), server_context(model))
    assert [(event["model"], event["asked"]) for event in tracker.events] == [("b", 1), ("c", 2)]
    assert len(set(detector.draws)) == 1
    assert [result["model"] for result in screening.results] == ["a", "b", "c"]


def test_a_destroyed_model_has_no_auroc() -> None:
    """A model of NaN answers class 0 to everything, which would look like a detector's failure."""
    model, tracker, detector = small_model(), Kept(), Brightness()
    torch.nn.init.constant_(model.head.weight, math.nan)
    Screening({"brightness": detector}, spotted(40), 0, tracker).inspect(
        "nan", model, white_backdoor(), server_context(model)
    )
    assert tracker.events[0]["auroc"] is None
    assert "NaN" in tracker.events[0]["reason"]
    assert detector.contexts == []


def test_the_toy_trigger_is_no_natural_one() -> None:
    """Or the test above would say nothing of it."""
    assert not hasattr(White(), "selects")


# In runs --------------------------------------------------------------------------------------------------------------


def only(folder: Path) -> Path:
    [done] = folder.rglob("done")
    return done.parent


def stopping_at(which: int) -> Any:
    """The measurement, interrupted when it is asked for the `which`-th time."""
    original, asked = module.scored, iter(range(1, 100))

    def stopping(*rest: Any) -> Any:
        if next(asked) == which:
            raise KeyboardInterrupt
        return original(*rest)

    return stopping


def test_a_run_ends_with_its_detection_and_survives_an_interruption_there(
    cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an erasing in the last round the model before it is tried, too; resumed, the numbers are the same."""
    words = ["run", *tiny.TINY, *tiny.ERASING, "rounds=2", "detection=scale_up"]
    assert main([*words, "output=whole"]) == OK
    assert "scale_up, final: AUROC" in capsys.readouterr().out
    whole = only(cwd / "whole")
    found = tiny.events(whole, "detection")
    assert [(event["round"], event["model"]) for event in found] == [(2, "before_erasing"), (2, "final")]
    assert all(0 <= e["auroc_low"] <= e["auroc"] <= e["auroc_high"] <= 1 and e["stamped"] > 50 for e in found)
    assert json.loads((whole / "summary.json").read_text())["detections"] == [
        {key: value for key, value in event.items() if key != "event"} for event in found
    ]
    with monkeypatch.context() as patch:
        patch.setattr(module, "scored", stopping_at(2))
        assert main(words) == 130
    [config] = (cwd / "runs").rglob("config.yaml")
    assert main(["resume", str(config.parent)]) == OK
    assert tiny.numbers(config.parent) == tiny.numbers(whole)


def test_without_an_erasing_in_the_last_round_only_the_final_model_is_tried(tmp_path: Path) -> None:
    """Nor is anything tried where nothing was asked for; the rounds are the same either way."""
    plain = tiny.run(tmp_path / "plain", *tiny.ERASING)
    folder = tiny.run(tmp_path / "tried", *tiny.ERASING, "detection=scale_up", "detection.normalise=false")
    assert [event["model"] for event in tiny.events(folder, "detection")] == ["final"]
    assert tiny.numbers(folder)[:-1] == tiny.numbers(plain)
    assert "detections" not in json.loads((plain / "summary.json").read_text())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Erasers and extractors of a few steps, whatever their yaml says."""
    original = compose_config

    def composed(overrides: Any) -> Any:
        config = original(overrides)
        for section in (*config["erasers"].values(), *config["detectors"].values()):
            section |= {"epochs": 1, "min_steps": 4} if "epochs" in section else {}
        return config

    monkeypatch.setattr("fl_sim.composing.compose_config", composed)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("which", [2, 5])
def test_an_interrupted_central_run_goes_on_with_its_detectors(
    cwd: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """Two detectors on a victim and two erased models: stopped on the victim or on the second one, nothing is lost."""
    words = ["central", *QUICK, "erasers=[fine_tune,reinit_head]", "detectors=[ntd,scale_up]"]
    assert main([*words, "output=whole"]) == OK
    whole = only(cwd / "whole")
    found = [(event["model"], event["detector"]) for event in tiny.events(whole, "detection")]
    assert found == [(m, d) for m in ("victim", "fine_tune", "reinit_head") for d in ("ntd", "scale_up")]
    assert len({event["extractor_acc"] for event in tiny.events(whole, "detection") if "extractor_acc" in event}) == 1
    with monkeypatch.context() as patch:
        patch.setattr(module, "scored", stopping_at(which))
        assert main(words) == 130
    [config] = (cwd / "runs").rglob("config.yaml")
    assert main(["resume", str(config.parent)]) == OK
    assert tiny.numbers(config.parent) == tiny.numbers(whole)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (config.parent, whole)]
    first, second = ([d | {"seconds": 0} for d in summary["detections"]] for summary in summaries)
    assert first == second


@pytest.mark.usefixtures("quick")
def test_the_central_table_has_a_column_for_each_detector(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`detection=` alone is one detector, as `eraser=` is one eraser; without any the table is as it was."""
    assert main(["central", *QUICK, "detection=scale_up", "output=one"]) == OK
    folder = only(cwd / "one")
    [event] = tiny.events(folder, "detection")
    head, _, row = (folder / "table.md").read_text().splitlines()
    cells = dict(zip(head.split("|"), row.split("|"), strict=True))
    assert float(cells[" AUROC scale_up "]) == pytest.approx(event["auroc"], abs=6e-4)
    assert (folder / "table.csv").read_text().split("\n")[0].count("auroc_scale_up") == 2
    # The victim is found again, because a detector decides nothing about it.
    monkeypatch.setattr(central, "train_victim", lambda *rest: pytest.fail("trained again"))
    assert main(["central", *QUICK, "name=none", "output=one"]) == OK
    without = [path.parent for path in (cwd / "one").rglob("done") if path.parent != folder]
    assert "AUROC" not in (without[0] / "table.md").read_text()


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["detection=ntd", "detection.nearest=0"], "detection.nearest"),
        (["detection=ntd", "detection.epochs=0"], "detection.epochs"),
        (["detection=scale_up", "detection.factors=[]"], "detection.factors"),
        (["detection=scale_up", "detection.factors=[3,-1]"], "detection.factors"),
        (["detection=scale_up", "detection.normalise=1"], "detection.normalise"),
        (["detection=sampdetox"], "detection"),
        (["detectors=ntd"], "detectors"),
        (["detectors=[ntd,nda]"], "detectors"),
        (["detection=ntd", "eraser=none", "data.clean_fraction=0"], "data.clean_fraction"),
        (["detectors=[scale_up]", "eraser=none", "data.clean_fraction=0"], "data.clean_fraction"),
        (["detection=none", "+detection._target_=defenses.erasing.nad.Nad"], "detection._target_"),
    ],
)
def test_strange_wishes_are_refused(words: list[str], key: str) -> None:
    """By the key at fault."""
    with pytest.raises(ConfigError) as caught:
        build(compose_config(words))
    assert caught.value.key == key


def test_the_data_free_form_needs_no_clean_set() -> None:
    """It looks at the model's answers alone."""
    words = ["eraser=none", "data.clean_fraction=0", "detection=scale_up", "detection.normalise=false"]
    assert build(compose_config(words)).detection is not None


def test_a_run_folder_from_before_there_were_detectors_can_still_be_built() -> None:
    """Its configuration lacks the group and the key."""
    config = tiny.tiny()
    del config["detection"], config["detectors"]
    assert build(config).detection is None
    assert execution.prepare(config).parts.detectors == {}
