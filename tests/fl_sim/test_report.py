"""What a report makes of its runs: groups, comparisons, sentences, tables and the page."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import made
import pytest

from fl_sim.cli import OK, USAGE, main
from fl_sim.report.curves import curve_bands, durability, erasing_marks
from fl_sim.report.page import content, embedded, page
from fl_sim.report.report import Report, report_on
from fl_sim.report.tables import comparisons_csv, configurations_csv, markdown
from fl_sim.report.wording import by_setting, left_out, sentence, setting_sentence

Capture = pytest.CaptureFixture[str]
NOISE = (0.00, 0.01, -0.01, 0.02, -0.02, 0.005)


def sweep(folder: Path, seeds: int = 5) -> Path:
    """Two attacks by three defenses by seeds: no defense leaves ASR near 0.95, fine-tuning 0.3, nad the same 0.3.

    The noise of a seed is the same for all defenses, so that only a paired test can use it.
    """
    for attack in ("data_poisoning", "model_replacement"):
        for eraser, asr, acc in (("none", 0.95, 0.9), ("fine_tune", 0.3, 0.85), ("nad", 0.3, 0.85)):
            for seed in range(seeds):
                noise = NOISE[seed]
                own = noise / 10 * (1 if eraser == "nad" else -1 if eraser == "fine_tune" else 0)
                scores = [(acc + noise / 2 + own, asr + noise + own)] * 3
                events = [made.erase(2, (0.9, 0.95), scores[1], eraser=eraser)] if eraser != "none" else []
                name = f"{attack}-{eraser}-{seed}"
                made.run(folder / name, seed, scores, *events, attack=attack, eraser=eraser)
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return report_on([sweep(tmp_path_factory.mktemp("sweep"))])


def index_of(report: Report, defense: str, setting: str = "model_replacement") -> int:
    [index] = [i for i, g in enumerate(report.groups) if g.defense == defense and setting in g.setting]
    return index


# Groups ---------------------------------------------------------------------------------------------------------------


def test_seeds_are_one_group_and_what_varies_is_named(swept: Report) -> None:
    assert swept.grouped.varied == {
        "attack": ["data_poisoning", "model_replacement"],
        "eraser": ["fine_tune", "nad", "none"],
    }
    assert [(group.setting, group.defense, len(group.cases)) for group in swept.groups] == [
        (attack, defense, 5)
        for attack in ("data_poisoning", "model_replacement")
        for defense in ("no defense", "fine_tune", "nad")
    ]


def test_a_choices_own_keys_count_only_within_the_choice(tmp_path: Path) -> None:
    """That krum has a key which mean lacks is no difference beyond their names; two values of it are one."""
    made.run(tmp_path / "a", 0, [(1, 1)], aggregator="mean")
    made.run(tmp_path / "b", 0, [(1, 1)], aggregator=("krum", {"keep": 1}))
    assert set(report_on([tmp_path]).grouped.varied) == {"aggregator"}
    made.run(tmp_path / "c", 0, [(1, 1)], aggregator=("krum", {"keep": 2}))
    report = report_on([tmp_path])
    assert report.grouped.varied == {"aggregator": ["krum", "mean"], "aggregator.keep": ["1", "2", "–"]}
    assert [group.defense for group in report.groups] == [
        "no defense",
        "krum (aggregator.keep=1)",
        "krum (aggregator.keep=2)",
    ]


def test_an_implied_key_is_left_out_of_the_name_but_not_of_the_filters(tmp_path: Path) -> None:
    made.run(tmp_path / "a", 0, [(1, 1)], attack="pgd", clients=10)
    made.run(tmp_path / "b", 0, [(1, 1)], attack="iba", clients=20)
    report = report_on([tmp_path])
    assert [group.setting for group in report.groups] == ["iba", "pgd"]
    assert set(report.grouped.varied) == {"attack", "clients"}


def test_the_same_seed_twice_counts_once(tmp_path: Path) -> None:
    """Repeating a run is no new evidence: its numbers are the same by contract."""
    for name in ("a", "b"):
        made.run(tmp_path / name, 0, [(0.9, 0.1)] * 3)
    made.run(tmp_path / "c", 0, [(0.5, 0.5)], planned=3, done=False)
    report = report_on([tmp_path])
    [group] = report.groups
    assert [report.sources[case.run].folder.name for case in group.cases] == ["a"]
    assert [Path(line.partition(":")[0]).name for line in left_out(report)] == ["b", "c"]


def test_seeds_that_differ_in_a_part_are_other_seeds(tmp_path: Path) -> None:
    for train in (0, 1):
        config = made.config(0, 1) | {"seeds": {"data": 0, "threat": 0, "train": train}}
        made.write(tmp_path / str(train), config, made.rounds([(0.9, 0.1)]))
    [group] = report_on([tmp_path]).groups
    assert [case.seeds for case in group.cases] == [("0",), ("0", "0", "1")]


# Comparisons ----------------------------------------------------------------------------------------------------------


def test_a_defense_is_compared_with_both_controls_seed_by_seed(swept: Report) -> None:
    """nad - none is -0.65 + noise/10 a seed: mean -0.65 of five; nad - fine_tune is noise/5, whose mean is 0."""
    found = swept.against(index_of(swept, "nad"), "asr_late")
    assert set(found) == {"no defense", "fine-tuning"}
    none, tune = found["no defense"], found["fine-tuning"]
    assert (none.paired.difference.n, none.paired.difference.mean) == (5, pytest.approx(-0.65))
    assert none.verdict == "better"
    assert tune.paired.difference.mean == pytest.approx(0)
    assert tune.verdict == "no evidence of a difference"
    assert swept.against(index_of(swept, "nad"), "acc")["no defense"].verdict == "worse"
    assert not swept.against(index_of(swept, "no defense"), "asr_late")


def test_holm_corrects_over_all_comparisons_of_a_measure(swept: Report) -> None:
    """Two attacks, nad against two controls and fine-tuning against one: six; the smallest p is multiplied by six."""
    own = [each for each in swept.comparisons if each.measure == "asr_late"]
    assert len(own) == 6
    smallest = min(own, key=lambda each: each.paired.p or 1)
    assert smallest.holm_p == pytest.approx(6 * (smallest.paired.p or 1))


@pytest.mark.parametrize("seeds", [1, 2])
def test_nothing_is_better_by_one_seed_or_two(tmp_path: Path, seeds: int) -> None:
    """Two differences of nearly 1 have a tiny p, and say nothing of how much a third would differ."""
    report = report_on([sweep(tmp_path, seeds=seeds)])
    assert {each.verdict for each in report.comparisons} == {"too few seeds"}
    text = " ".join(sentence(report, index) for index in range(len(report.groups)))
    assert not re.search("higher by|lower by|better|worse", text)


def test_a_setting_in_a_sentence(swept: Report) -> None:
    """Means of 0.95 without a defense, 0.3 with either; both lower it in all seeds, and both cost 0.05 of ACC."""
    for indexes in by_setting(swept).values():
        said = setting_sentence(swept, indexes)
        assert said.startswith("Without a defense late ASR is 0.950 ± 0.020. The lowest mean of 2 has ")
        for name in ("late ASR", "ACC"):
            assert f"By the corrected test, {name} is lower than without a defense in 2 of 2." in said


def test_only_common_seeds_are_compared(tmp_path: Path) -> None:
    """Seed 9 of nad has no control, seed 1 of it is not finished."""
    for seed in (0, 1, 2):
        made.run(tmp_path / f"none{seed}", seed, [(0.9, 0.9 + seed / 100)])
    for seed in (0, 2, 9):
        made.run(tmp_path / f"nad{seed}", seed, [(0.9, 0.1)], eraser="nad")
    made.run(tmp_path / "nad1", 1, [(0.9, 0.1)], eraser="nad", planned=2, done=False)
    report = report_on([tmp_path])
    [found] = [each for each in report.comparisons if each.measure == "asr"]
    assert (found.paired.difference.n, found.paired.difference.mean) == (2, pytest.approx(-0.81))


def test_other_settings_are_never_controls(tmp_path: Path) -> None:
    made.run(tmp_path / "a", 0, [(0.9, 0.9)], clients=10)
    made.run(tmp_path / "b", 0, [(0.9, 0.1)], clients=20, eraser="nad")
    assert not report_on([tmp_path]).comparisons


def test_of_several_controls_the_most_alike_is_taken(tmp_path: Path) -> None:
    """Fine-tuning with as many steps, and a no-defense run whatever its idle schedule of erasing."""
    for steps in (100, 400):
        made.run(tmp_path / f"t{steps}", 0, [(0.9, steps / 1000)], eraser=("fine_tune", {"min_steps": steps}))
    made.run(tmp_path / "nad", 0, [(0.9, 0.0)], eraser=("nad", {"min_steps": 400}))
    made.run(tmp_path / "none", 0, [(0.9, 1.0)], erasing=("every", {"rounds": 3}))
    report = report_on([tmp_path])
    found = {
        each.against: each
        for each in report.comparisons
        if each.measure == "asr" and each.group == index_of(report, "nad", "")
    }
    assert found["fine-tuning"].paired.difference.mean == pytest.approx(-0.4)
    assert found["no defense"].paired.difference.mean == pytest.approx(-1.0)


def test_the_asr_of_an_unattacked_run_is_not_compared(tmp_path: Path) -> None:
    """It would only weaken the correction of those that matter; ACC shows what a defense costs."""
    made.run(tmp_path / "a", 0, [(0.9, 0.01)], attack="none")
    made.run(tmp_path / "b", 0, [(0.8, 0.02)], attack="none", eraser="nad")
    assert [each.measure for each in report_on([tmp_path]).comparisons] == ["acc"]


# Curves ---------------------------------------------------------------------------------------------------------------


def test_a_curve_falls_where_it_was_erased(tmp_path: Path) -> None:
    """Round 2 has two points: what the eraser found, 1.0 and 0.8 in two seeds, and what was left, 0.1 and 0.3."""
    for seed, (found, left) in enumerate([(1.0, 0.1), (0.8, 0.3)]):
        erase = made.erase(2, (0.9, found), (0.9, left))
        made.run(tmp_path / str(seed), seed, [(0.9, 0.5), (0.9, left), (0.9, 0.6)], erase, eraser="nad")
    [group] = report_on([tmp_path]).groups
    band = curve_bands(group)["asr"]
    assert list(band.at) == [1, 2, 2, 3]
    assert band.mean == pytest.approx([0.5, 0.9, 0.2, 0.6])
    assert erasing_marks(group) == [(2, 2, 0)]
    after = durability(group)
    assert after is not None
    assert (list(after.at), after.mean) == ([0, 1], pytest.approx([0.2, 0.6]))


# Tables ---------------------------------------------------------------------------------------------------------------


def test_the_csv_holds_the_numbers(swept: Report) -> None:
    """Read back by the csv module: mean of nad's ASR is 0.3 + the mean of noise * 1.1, which is 0."""
    rows = list(csv.DictReader(io.StringIO(configurations_csv(swept))))
    [row] = [row for row in rows if row["defense"] == "nad" and row["key:attack"] == "data_poisoning"]
    assert float(row["asr"]) == pytest.approx(0.3)
    assert row["asr_n"] == "5"
    assert float(row["erasing_seconds"]) == 0.5
    compared = list(csv.DictReader(io.StringIO(comparisons_csv(swept))))
    assert {row["verdict"] for row in compared} == {"better", "worse", "no evidence of a difference"}
    assert all(0 <= float(row["holm_p"]) <= 1 for row in compared)


def test_the_markdown_table_is_rectangular(swept: Report) -> None:
    # Half of nad's interval: t of 4 degrees, 2.776, times 1.1 times the noise's deviation, 0.0158, through √5.
    text = markdown(swept)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    first = [line for line in rows if line.count(" | ") == rows[0].count(" | ")]
    assert len(first) == 1 + 6
    assert "| nad | 5 | 0.850 ± 0.012† | 0.300 ± 0.022† |" in text


# The page -------------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """The page's tags, and the text of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts.append(data)


def test_the_page_needs_nothing_else(swept: Report) -> None:
    """Nothing is linked but an empty icon, and its own policy forbids to fetch; the numbers are inside."""
    text = page(swept, title="a </title><b>")
    reader = Reader()
    reader.feed(text)
    assert "src" not in {name for _, attributes in reader.tags for name in attributes}
    assert [attributes["href"] for _, attributes in reader.tags if "href" in attributes] == ["data:,"]
    assert "default-src 'none'" in text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text)
    assert not {tag for tag, _ in reader.tags} & {"b"}
    data = json.loads(reader.scripts[0])
    assert len(data["groups"]) == 6
    assert len(data["runs"]) == 30


def test_text_from_folders_cannot_leave_the_pages_data() -> None:
    """A folder or key may be called anything; in the page it remains text."""
    nasty = "</script><script>alert(1)</script><!-- & \u2028"
    said = embedded({"name": nasty})
    assert "<" not in said
    assert "\u2028" not in said
    assert json.loads(said) == {"name": nasty}


def test_every_number_leads_to_its_runs_and_each_run_to_its_command_and_configuration(swept: Report) -> None:
    """The whole configuration of a run is what it shares with all and what it does not."""
    data: dict[str, Any] = content(swept, "x")
    for group in data["groups"]:
        assert len(group["cases"]) == 5
        assert all(cell["n"] == 5 for cell in group["cells"].values())
    case = data["groups"][index_of(swept, "nad")]["cases"][3]
    run = data["runs"][case["run"]]
    assert run["command"] == "fl-sim run a=b"
    assert run["folder"].endswith("model_replacement-nad-3")
    whole = data["common"] | run["config"]
    assert (whole["seed"], whole["choices.eraser"], whole["eraser._target_"]) == ("3", "nad", "some.nad")
    assert not set(data["common"]) & set(run["config"])


# The command ----------------------------------------------------------------------------------------------------------

FILES = ["cases.csv", "comparisons.csv", "configurations.csv", "report.html", "table.md", "table.tex"]


def test_the_command_writes_all_files_and_says_what_it_left_out(cwd: Path, capsys: Capture) -> None:
    sweep(cwd / "runs", seeds=2)
    (cwd / "runs" / "bad").mkdir()
    (cwd / "runs" / "bad" / "metrics.jsonl").write_text("no\n")
    assert main(["report", "runs", "-o", "out/here"]) == OK
    assert sorted(os.listdir(cwd / "out" / "here")) == FILES
    shown = capsys.readouterr()
    assert "12 runs: 6 configurations in 2 settings, 2 seeds each" in shown.out
    assert "left out: runs/bad" in shown.err
    assert main(["report", "runs", "-o", "only.tex"]) == OK
    assert (cwd / "only.tex").read_bytes() == (cwd / "out" / "here" / "table.tex").read_bytes()
    assert main(["report", "runs"]) == OK
    assert sorted(os.listdir(cwd / "report")) == FILES


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["report"], USAGE, "takes run folders"),
        (["report", "none"], USAGE, "folder=none: no such folder"),
        (["report", "runs", "-o"], USAGE, "-o: takes a file or a folder"),
        (["report", "runs", "-o", "file.txt"], USAGE, "-o=file.txt: must be a folder, or a file that ends in .html"),
        (["report", "runs", "-o", "no/where.html"], USAGE, "there is no folder no"),
        (["report", "runs", "--jobs", "3"], USAGE, "no such option"),
        (["report", "empty"], USAGE, "nothing to report"),
    ],
)
def test_what_it_cannot_do_is_said_in_a_line_and_leaves_nothing(
    cwd: Path, capsys: Capture, words: list[str], status: int, said: str
) -> None:
    made.run(cwd / "runs" / "a", 0, [(0.9, 0.1)])
    (cwd / "empty").mkdir()
    (cwd / "file.txt").write_text("mine")
    assert main(words) == status
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert sorted(os.listdir(cwd)) == ["empty", "file.txt", "runs"]


def test_a_report_loads_neither_torch_nor_pandas(tmp_path: Path) -> None:
    """Seconds that nobody should wait for a table."""
    made.run(tmp_path / "a", 0, [(0.9, 0.1)])
    code = (
        "import sys; from fl_sim.cli import main; status = main(sys.argv[1:]);"
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'pandas', 'hydra', 'flwr', 'matplotlib')))"
    )
    words = [sys.executable, "-c", code, "report", str(tmp_path), "-o", str(tmp_path / "out")]
    subprocess.run(words, check=True, timeout=300)


def many(folder: Path, runs: int, rounds: int) -> None:
    """Runs of realistic size: five seeds of each defense, twenty fields a round."""
    more = {f"field_{number}": 0.123456789012345 for number in range(10)}
    for number in range(runs):
        scores = [(0.9, (t * 7 + number) % 100 / 100) for t in range(rounds)]
        eraser, seed, attack = f"eraser_{number // 5 % 10}", number % 5, f"attack_{number // 50}"
        erase = [made.erase(t, (0.9, 0.9), (0.9, 0.1)) for t in range(10, rounds, 10)]
        config = made.config(seed, rounds, attack=attack, eraser="none" if eraser == "eraser_0" else eraser)
        config |= {f"section_{k}": {f"key_{j}": j for j in range(10)} for k in range(12)}
        made.write(folder / str(number), config, [*made.rounds(scores, **more), *erase])


@pytest.mark.parametrize("runs", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_many_runs_are_reported_in_time(tmp_path: Path, runs: int) -> None:
    """500 runs of 200 rounds within 20 s of processor time and 1 GB; a tenth of them in a tenth, and the start."""
    many(tmp_path / "runs", runs, 200)
    code = (
        "import pathlib, resource, sys; from fl_sim.cli import main; status = main(sys.argv[1:]);"
        "used = resource.getrusage(resource.RUSAGE_SELF); linux = pathlib.Path('/proc/self/status');"
        # On Linux ru_maxrss counts the process that this one was forked from, too.
        "own = linux.exists() and next(w for w in linux.read_text().splitlines() if w.startswith('VmHWM')).split()[1];"
        "print('used', used.ru_utime + used.ru_stime, own or used.ru_maxrss)"
    )
    words = [sys.executable, "-c", code, "report", str(tmp_path / "runs"), "-o", str(tmp_path / "out")]
    started = time.perf_counter()
    done = subprocess.run(words, check=True, timeout=600, capture_output=True, text=True)
    seconds, memory = (float(word) for word in done.stdout.splitlines()[-1].split()[1:])
    assert seconds < 3 + 17 * runs / 500, f"{time.perf_counter() - started:.1f} s on the clock"
    assert memory * (1 if sys.platform == "darwin" else 1024) < 1e9
    assert (tmp_path / "out" / "report.html").stat().st_size < 20e6
