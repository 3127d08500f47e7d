"""What a report reads: run folders of every state, and folders that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made
import pytest

from fl_sim.errors import ConfigError, RunError
from fl_sim.report.cases import BESIDE, CENTRAL, cases_of, flat
from fl_sim.report.page import page
from fl_sim.report.reading import Run, Unread, read_runs
from fl_sim.report.report import cell, report_on
from fl_sim.report.tables import latex, markdown
from fl_sim.report.wording import left_out, refusals, sentence

FOUR = [(0.5, 0.2), (0.6, 0.4), (0.7, 0.6), (0.8, 0.9)]


def unread(*folders: Path) -> dict[str, str]:
    return {each.folder.name: each.reason for each in read_runs(folders) if isinstance(each, Unread)}


def test_runs_are_found_at_any_depth_once_and_in_order(tmp_path: Path) -> None:
    """Whoever gives a sweep and one of its runs, too, must not count that run twice."""
    made.run(tmp_path / "b" / "deep" / "two", 0, FOUR)
    made.run(tmp_path / "a", 0, FOUR)
    found = list(read_runs([tmp_path, tmp_path / "a", tmp_path / "b"]))
    assert [each.folder.relative_to(tmp_path).as_posix() for each in found] == ["a", "b/deep/two"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metrics.jsonl", '{"event": "round"\n', "line 1 is not JSON"),
        ("metrics.jsonl", "[1]\n", "line 1 is not an event"),
        ("metrics.jsonl", '{"event": "round", "round": "one"}\n', "round='one'"),
        ("metrics.jsonl", '{"event": "round", "round": 1, "acc": "high"}\n', "acc='high'"),
        ("metrics.jsonl", '{"event": "erase", "round": 1}\n', "lacks its eraser"),
        ("metrics.jsonl", '{"event": "central", "method": "victim"}\n', "lacks its epoch"),
        ("metrics.jsonl", '{"event": 3}\n', "name is 3"),
        ("metrics.jsonl", "[" * 100_000 + "\n", "line 1 is not JSON"),
        ("metrics.jsonl", "", "holds no scores yet"),
        ("config.yaml", "rounds: [1", "can't read config.yaml"),
        ("config.yaml", "!!python/object/apply:os.system ['true']", "can't read config.yaml"),
        ("config.yaml", "- 1", "not a run's configuration"),
        ("config.yaml", "rounds: 3", "not a run's configuration"),
        ("config.yaml", "choices: {attack: [1]}\nattack: {? [a, b] : 1}", "can't read config.yaml"),
        ("config.yaml", "choices: {[a]: 1}", "can't read config.yaml"),
        (
            "metrics.jsonl",
            '{"event": "round", "round": 1, "acc": 1, "asr": 1}\n{"event": "erase", "round": -1}\n',
            "round=-1",
        ),
    ],
)
def test_what_cannot_be_read_is_listed_with_its_reason(tmp_path: Path, name: str, content: str, reason: str) -> None:
    """One damaged folder among many good ones must cost nothing but itself."""
    made.run(tmp_path / "good", 0, FOUR)
    made.run(tmp_path / "bad", 0, FOUR)
    (tmp_path / "bad" / name).write_text(content)
    report = report_on([tmp_path])
    assert len(report.sources) == 1
    assert [each.folder.name for each in report.unread] == ["bad"]
    assert reason in report.unread[0].reason


def test_a_number_beyond_all_floats_is_no_score(tmp_path: Path) -> None:
    """JSON has integers of any length."""
    folder = made.run(tmp_path / "run", 0, [(0.5, 0.5)])
    text = (folder / "metrics.jsonl").read_text().splitlines()
    text.insert(1, '{"event": "round", "round": 1, "acc": 1' + "0" * 400 + ', "asr": 0.5}')
    (folder / "metrics.jsonl").write_text("\n".join(text) + "\n")
    [run] = read_runs([tmp_path])
    assert isinstance(run, Run)
    assert None in [event.get("acc") for event in run.events if event["event"] == "round"]


def test_a_strange_configuration_is_read_as_far_as_it_can_be(tmp_path: Path) -> None:
    """Lists where one value belongs, keys that are no words, sections that are none: nothing of it stops a report."""
    made.run(tmp_path / "good", 0, FOUR)
    made.run(tmp_path / "odd", 0, FOUR)
    odd = (
        "choices: {attack: [1], 3: x}\nseed: [1, 2]\nseeds: {data: [1], train: {a: 1}}\n7: 1\nattack: 5\neraser: [1]\n"
    )
    (tmp_path / "odd" / "config.yaml").write_text(odd)
    (tmp_path / "odd" / "meta.json").write_text('{"argv": [1, null], "device": {}}')
    report = report_on([tmp_path])
    assert len(report.sources) + len(report.unread) == 2
    for make in (markdown, latex, page):
        assert make(report)


def test_foreign_folders(tmp_path: Path) -> None:
    """A folder without a run is told; one that is not there was a mistake of whoever typed it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "metrics.jsonl").write_text("")
    assert unread(tmp_path / "empty", tmp_path / "half").keys() == {"empty", "half"}
    with pytest.raises(ConfigError, match="no such folder"):
        list(read_runs([tmp_path / "none"]))
    with pytest.raises(RunError, match="nothing to report"):
        report_on([tmp_path])


def test_a_run_without_meta_json_or_with_unknown_fields_is_read(tmp_path: Path) -> None:
    """Later versions add events and fields; older ones lack files."""
    folder = made.run(tmp_path / "run", 0, FOUR, {"event": "new", "round": "?", "x": [1]})
    (folder / "meta.json").unlink()
    [found] = read_runs([folder])
    assert isinstance(found, Run)
    assert found.argv == []
    assert not found.central
    [case] = cases_of(found, 0)
    assert case.measures["asr"] == 0.9


def test_an_unfinished_run_has_a_curve_but_no_final_numbers(tmp_path: Path) -> None:
    """Its last round is not its end; in the mean it would pull the finished ones."""
    made.run(tmp_path / "0", 0, FOUR)
    made.run(tmp_path / "1", 1, FOUR[:2], planned=4, done=False)
    with (tmp_path / "1" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "round", "rou')  # what a crash leaves
    report = report_on([tmp_path])
    [group] = report.groups
    assert [case.finished for case in group.cases] == [True, False]
    assert report.sources[1].state == "unfinished: round 2 of 4"
    assert list(group.cases[1].curve.at) == [1, 2]
    found = cell(group, "acc")
    assert found is not None
    assert (found.mean, found.half, found.n) == (0.8, None, 1)


def test_a_copy_without_its_done_file_is_finished_if_all_rounds_are_there(tmp_path: Path) -> None:
    made.run(tmp_path / "0", 0, FOUR, done=False)
    assert report_on([tmp_path]).sources[0].state == "finished"


def test_the_measures_of_a_federated_run(tmp_path: Path) -> None:
    """By hand: the last third of four rounds is rounds 3 and 4; the erasing after round 2 found ASR 0.95, left 0.4.

    0.6 in round 3 is above half of 0.95, so that it held for one round. That of round 4 could not be watched.
    """
    events = [made.erase(2, (0.62, 0.95), (0.6, 0.4), der=0.7), made.erase(4, (0.8, 0.99), (0.8, 0.9), der=0.5)]
    rates = [{"event": "round", "round": 5, "seconds": 1.0, "tpr": 0.5, "fpr": 0.25}]
    made.run(tmp_path / "run", 0, FOUR, *events, *rates, eraser="nad")
    [run] = read_runs([tmp_path])
    assert isinstance(run, Run)
    [case] = cases_of(run, 0)
    assert case.measures == pytest.approx(
        {
            "acc": 0.8,
            "asr": 0.9,
            "acc_late": 0.75,
            "asr_late": 0.75,
            "asr_max": 0.99,
            "der": 0.6,
            "held": 1.0,
            "tpr": 0.5,
            "fpr": 0.25,
            "seconds": 5.0,
            "taken": 1.0,
            "erasing_seconds": 1.0,
        }
    )


@pytest.mark.parametrize(
    ("asrs", "held"),
    [
        ([0.1, 0.2, 0.3, 0.4], 2.0),  # erased after round 2, not back by round 4: two rounds at least
        ([0.1, 0.2, 0.6, 0.7], 1.0),
        ([0.1, 0.9, 0.9, 0.9], 0.0),  # never erased
    ],
)
def test_how_long_an_erasing_held(tmp_path: Path, asrs: list[float], held: float) -> None:
    """Until ASR is above half of the 1.0 that it found."""
    erase = made.erase(2, (0.9, 1.0), (0.9, asrs[1]))
    made.run(tmp_path / "run", 0, [(0.9, asr) for asr in asrs], erase, eraser="nad")
    [group] = report_on([tmp_path]).groups
    assert group.cases[0].measures["held"] == held


def test_a_refused_erasing_holds_nothing_and_ends_nothing(tmp_path: Path) -> None:
    """The first held through the refused one, until round 4."""
    first = made.erase(1, (0.9, 1.0), (0.9, 0.1))
    refused = made.erase(2, (0.9, 0.2), (0.1, 0.0), accepted=False, reason="it fell")
    made.run(tmp_path / "run", 0, [(0.9, asr) for asr in (0.1, 0.2, 0.3, 0.8)], first, refused, eraser="nad")
    [group] = report_on([tmp_path]).groups
    assert group.cases[0].measures["held"] == 3.0


def central(folder: Path, seed: int, *erasers: str) -> Path:
    """A centralized run: a victim of ACC 0.9 and ASR 1, erasers that leave ASR 0.1, 0.2, ..."""
    events = [
        {"event": "central", "round": 0, "method": "victim", "epoch": e, "acc": 0.4 * e, "asr": 1} for e in (1, 2)
    ]
    for number, name in enumerate(erasers, start=1):
        events.append({"event": "central", "round": 0, "method": name, "epoch": 1, "acc": 0.5, "asr": 0.5})
        events.append(made.erase(0, (0.9, 1.0), (0.85, number / 10), eraser=name))
    config = made.config(seed, 30, erasers={name: {"_target_": name, "lr": 0.1} for name in erasers})
    return made.write(folder, config, events, ["fl-sim", "central"])


def test_a_centralized_run_is_a_victim_and_what_each_eraser_made_of_it(tmp_path: Path) -> None:
    """The victim is the control of its erasers; its exact scores are those that the erasers found."""
    central(tmp_path / "run", 0, "nad", "fine_tune")
    report = report_on([tmp_path])
    found = {group.defense: (group.kind, group.cases[0].measures) for group in report.groups}
    assert {name: kind for name, (kind, _) in found.items()} == dict.fromkeys(
        ("no defense", "nad", "fine_tune"), CENTRAL
    )
    assert found["no defense"][1] == {"acc": 0.9, "asr": 1.0}
    assert found["nad"][1] == {"acc": 0.85, "asr": 0.1, "erasing_seconds": 0.5, "taken": 1.0}
    assert len({group.setting for group in report.groups}) == 1


def test_centralized_runs_with_other_erasers_share_their_victim(tmp_path: Path) -> None:
    """Two lists of erasers on one victim: the victim is the same number twice and counts once."""
    central(tmp_path / "a", 0, "nad")
    central(tmp_path / "b", 0, "fine_tune")
    report = report_on([tmp_path])
    assert {group.defense: (len(group.cases), len(group.repeats)) for group in report.groups} == {
        "no defense": (1, 1),
        "fine_tune": (1, 0),
        "nad": (1, 0),
    }


def test_baselines_beside_a_run_are_cases_of_their_own(tmp_path: Path) -> None:
    events = [{"event": "central", "round": 0, "method": "victim", "epoch": 1, "acc": 0.9, "asr": 1.0}]
    events.append(made.erase(0, (0.9, 1.0), (0.8, 0.1), eraser="fine_tune"))
    made.run(tmp_path / "run", 0, FOUR, *events, baselines={"fine_tune": {"lr": 0.1}})
    kinds = [(group.kind, group.defense) for group in report_on([tmp_path]).groups]
    assert kinds == [("federated", "no defense"), (BESIDE, "no defense"), (BESIDE, "fine_tune")]


def detection(model: str, detector: str, auroc: float) -> dict[str, Any]:
    return {"event": "detection", "round": 0, "model": model, "detector": detector, "auroc": auroc}


def test_detectors_are_measures_of_the_model_that_they_were_tried_on(tmp_path: Path) -> None:
    """Of a run the final one and what was erased last; of a centralized one the victim and what each eraser left."""
    made.run(tmp_path / "run", 0, FOUR, detection("before_erasing", "ntd", 0.9), detection("final", "ntd", 0.6))
    for name, detector, values in (("a", "ntd", (0.8, 0.7)), ("b", "scale_up", (0.5, 0.4))):
        with (central(tmp_path / name, 0, "nad") / "metrics.jsonl").open("a") as file:
            for model, value in zip(("victim", "nad"), values, strict=True):
                file.write(json.dumps(detection(model, detector, value)) + "\n")
    report = report_on([tmp_path])
    found = {
        (group.kind, group.defense): {k: v for k, v in group.cases[0].measures.items() if k.startswith("auroc")}
        for group in report.groups
    }
    assert found == {
        ("federated", "no defense"): {"auroc ntd": 0.6, "auroc ntd (before erasing)": 0.9},
        (CENTRAL, "no defense"): {"auroc ntd": 0.8, "auroc scale_up": 0.5},
        (CENTRAL, "nad"): {"auroc ntd": 0.7, "auroc scale_up": 0.4},
    }
    names = [measure.name for measure in report.measures if measure.key.startswith("auroc")]
    assert names == ["AUROC ntd", "AUROC ntd (before erasing)", "AUROC scale_up"]
    assert report.detectors == {
        "ntd": ("auroc ntd (before erasing)", "auroc ntd"),
        "scale_up": (None, "auroc scale_up"),
    }
    assert " ntd: AUROC 0.900 on the last erased model, 0.600 on the final model." in sentence(report, 0)


def test_what_was_refused_is_counted_and_told(tmp_path: Path) -> None:
    """Seed 0: of 4 + 4 + 8 (two attempts) updates 4 + 3 + 0 counted, and one of two erasings was refused.

    Seed 1 says nothing of refusals; its only erasing was taken. So 9 of 16 updates, one of three rounds and erasings.
    """
    asked = [
        {"clients": 4, "asked": 4, "refused": 1, "refused_for": {"stale": 1}, "skipped": False},
        {"clients": 3},
        {"clients": 0, "asked": 8, "refused": 6, "refused_for": {"late": 4, "raised": 2}, "skipped": True},
    ]
    asked[1] |= {"asked": 4, "refused": 1, "refused_for": {"late": 1}, "skipped": False}
    events = [{**event, **more} for event, more in zip(made.rounds(FOUR[:3]), asked, strict=True)]
    fell = made.erase(2, (0.6, 0.4), (0.1, 0.0), accepted=False, reason="accuracy fell")
    told = [fell, made.erase(3, (0.7, 0.6), (0.7, 0.6))]
    told += [{"event": "client_failed", "round": 3, "client": c, "reason": "InjectedCrash: no"} for c in (5, 7)]
    told.append(detection("final", "ntd", 0.0) | {"auroc": None, "reason": "a score is NaN or infinite"})
    made.write(tmp_path / "0", made.config(0, 3, eraser="nad"), [*events, *told])
    made.run(tmp_path / "1", 1, FOUR[:3], made.erase(2, (0.6, 0.4), (0.6, 0.4)), eraser="nad")
    made.run(tmp_path / "2", 1, FOUR[:3])
    report = report_on([tmp_path])
    [(index, words, said)] = refusals(report)
    assert words[1:] == ["nad", "1 of 3", "9 of 16", "late 5, raised 2, stale 1", "1 of 3"]
    assert said == [
        "seed 0, round 2: the model that nad left was refused: accuracy fell",
        "seed 0, no AUROC of ntd on the model 'final': a score is NaN or infinite",
        "seed 0, round 3: client 5 raised: InjectedCrash: no (and 1 more)",
    ]
    case = report.groups[index].cases[0]
    assert [case.measures[key] for key in ("taken", "lost", "skipped")] == pytest.approx([1 / 2, 9 / 16, 1 / 3])
    text = sentence(report, index)
    assert "The server refused 1 of its 3 erasings." in text
    assert "Of 16 updates 9 were lost (late 5, raised 2, stale 1), and 1 of 3 rounds came to nothing." in text
    assert "late 5, raised 2" in markdown(report)
    assert {"taken", "lost", "skipped"} <= {measure.key for measure in report.measures}


def test_a_report_without_refusals_has_no_word_of_them(tmp_path: Path) -> None:
    made.run(tmp_path / "run", 0, FOUR, made.erase(2, (0.6, 0.4), (0.6, 0.4)), eraser="nad")
    report = report_on([tmp_path])
    assert not refusals(report)
    assert not {"taken", "lost", "skipped"} & {measure.key for measure in report.measures}
    assert "refused" not in markdown(report).lower()


def test_a_centralized_eraser_that_a_server_would_refuse_is_told(tmp_path: Path) -> None:
    folder = central(tmp_path / "run", 0, "fine_tune")
    with (folder / "metrics.jsonl").open("a") as file:
        refused = made.erase(0, (0.9, 1.0), (0.1, 0.0), eraser="nad", accepted=False, reason="accuracy fell")
        file.write(json.dumps(refused) + "\n")
    [(_, words, said)] = refusals(report_on([tmp_path]))
    assert (words[1:3], said) == (["nad", "1 of 1"], ["seed 0, the model that nad left was refused: accuracy fell"])


def test_a_key_that_was_added_later_has_its_default(tmp_path: Path) -> None:
    """BadNets came to have an opacity, whose default is what it did before; another value is another trigger."""
    for seed, own in enumerate(({"size": 3}, {"size": 3, "opacity": 1.0}, {"size": 3, "opacity": 0.5})):
        made.run(tmp_path / str(seed), seed, FOUR, trigger=("badnets", own))
    report = report_on([tmp_path])
    assert [len(group.cases) for group in report.groups] == [1, 2]
    assert report.grouped.varied == {"trigger.opacity": ["0.5", "1.0"]}


def test_what_decides_no_number_is_no_key() -> None:
    """Folders, names, workers, trackers and descriptions; and when an absent eraser would have run."""
    config = made.config(
        3, 4, engine={"_target_": "x", "workers": 2, "precision": "float32"}, tracker={"_target_": "y"}
    )
    keys = flat(config | {"erasing": {"_target_": "z", "rounds": 10}})
    assert set(keys) == {"rounds", "engine.precision", *made.CHOICES, "aggregator", "eraser"}
    with_eraser = flat(made.config(3, 4, eraser="nad", erasing=("every", {"rounds": 10})))
    assert with_eraser["erasing.rounds"] == "10"
    assert json.dumps(with_eraser)
    assert "eraser.paper" not in with_eraser


def test_a_repeat_with_other_numbers_is_told_as_such(tmp_path: Path) -> None:
    """The first by its path counts; the same numbers once more are harmless, other ones are not."""
    for name, asr in (("a", 0.5), ("b", 0.5), ("c", 0.2)):
        made.run(tmp_path / name, 0, [(0.9, asr)])
    said = left_out(report_on([tmp_path]))
    assert len(said) == 2
    assert all(f"{tmp_path / 'a'}, which counts" in line for line in said)
    assert "b: the same configuration and seed as" in said[0]
    assert "c: the configuration and seed, but not the numbers, of" in said[1]
