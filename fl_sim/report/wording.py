"""What a report says in words: one sentence for each configuration, none of which claims more than its tests allow."""

from __future__ import annotations

from collections.abc import Sequence

from fl_sim.report.cases import FEDERATED, NONE
from fl_sim.report.comparing import LEAST, NO_EVIDENCE, Comparison
from fl_sim.report.grouping import NO_DEFENSE, Group
from fl_sim.report.refusals import Losses
from fl_sim.report.report import MEASURES, Measure, Report, cell
from fl_sim.report.statistics import LEVEL, Estimate

DASH = "–"
MARKS = {NO_DEFENSE: "†", "fine-tuning": "‡"}
"""What stands beside a number that differs from that control's."""
NOTE = (
    "Mean ± half of the 95 % interval (Student's t) over n seeds; a single seed has no interval. "
    f"{MARKS[NO_DEFENSE]} differs from no defense, {MARKS['fine-tuning']} from fine-tuning: paired over the seeds, "
    f"p < {LEVEL} after Holm's correction over all comparisons of the same measure."
)
METHOD = (
    "Compared are the same seeds in the same setting. p is the paired t test's, two-sided; where all differences are "
    "equal it is undefined and the sign-flip permutation test's counts, whose p can't be below 2/2ⁿ (0.0625 for five "
    f"seeds). From fewer than {LEAST} common seeds, or without a corrected p below {LEVEL}, nothing is called better "
    "or worse."
)
AUROC_MEASURE = Measure("auroc", "AUROC", "")
BY_KEY = {measure.key: measure for measure in MEASURES}


def number(estimate: Estimate | None, measure: Measure) -> str:
    """`0.987 ± 0.004`, or a dash."""
    if estimate is None:
        return DASH
    mean = f"{estimate.mean:.{measure.digits}f}"
    return mean if estimate.half is None else f"{mean} ± {estimate.half:.{measure.digits}f}"


def marks(report: Report, group: int, measure: str) -> str:
    """The marks of the controls from which a number differs for certain."""
    found = report.against(group, measure)
    return "".join(mark for name, mark in MARKS.items() if name in found and found[name].verdict in ("better", "worse"))


def p_value(p: float | None) -> str:
    if p is None:
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def seeds(group: Group) -> str:
    """How many seeds count, and how many are still running."""
    waiting = sum(not case.finished for case in group.cases)
    n = len(group.cases) - waiting
    return f"{n}" if not waiting else f"{n} (+{waiting} unfinished)"


def sentence(report: Report, index: int) -> str:
    """What came of one configuration."""
    group = report.groups[index]
    estimates = {key: cell(group, key) for key in ("acc", "asr", "asr_late", "held")}
    acc, asr, late = estimates["acc"], estimates["asr"], estimates["asr_late"]
    if acc is None:
        at = max((case.curve.at[-1] for case in group.cases if case.curve.at), default=0)
        return f"Not finished yet: at most {at} rounds or epochs are there."
    parts = [f"ACC {number(acc, BY_KEY['acc'])}"]
    if asr is not None:
        parts.append(f"ASR {number(asr, BY_KEY['asr'])}")
    n = f"n = {acc.n}"
    text = f"{' and '.join(parts)} at the end ({n})"
    if late is not None and group.attacked:
        text += f"; ASR {number(late, BY_KEY['asr_late'])} on average over the last third"
    text += "."
    if not group.attacked:
        text += " Nobody attacks: this ASR is that of a clean model."
    for name in MARKS:
        text += _against(report, index, name, "asr_late" if late is not None else "asr")
    if estimates["held"] is not None:
        text += f" Its erasings held for {number(estimates['held'], BY_KEY['held'])} rounds or more."
    return text + _refused(group) + _detected(report, group)


def erasings_refused(group: Group) -> tuple[int, int]:
    """How many of a configuration's erasings the server refused, and how many there were."""
    accepted = [each.accepted for case in group.cases for each in case.erasings]
    if not accepted:  # a centralized eraser is one erasing
        accepted = [case.measures["taken"] == 1 for case in group.cases if "taken" in case.measures]
    return len(accepted) - sum(accepted), len(accepted)


def group_losses(group: Group) -> Losses:
    """What became of the updates in all of a configuration's runs together."""
    return sum((case.losses for case in group.cases if case.losses is not None), Losses())


def reasons(found: Losses) -> str:
    """`late 20, raised 3`, the most frequent first."""
    return ", ".join(f"{name} {n}" for name, n in sorted(found.reasons.items(), key=lambda item: (-item[1], item[0])))


def _refused(group: Group) -> str:
    """What the server refused, if it refused anything."""
    (refused, erasings), lost = erasings_refused(group), group_losses(group)
    text = f" The server refused {refused} of its {_count(erasings, 'erasing')}." if refused else ""
    if lost.lost:
        text += f" Of {lost.asked} updates {lost.lost} were lost ({reasons(lost)})"
        text += f", and {lost.skipped} of {_count(lost.rounds, 'round')} came to nothing." if lost.skipped else "."
    return text


def _detected(report: Report, group: Group) -> str:
    """How well detectors of stamped inputs did, and on which of the models."""
    text = ""
    for name, (before, final) in report.detectors.items():
        found = [
            f"{number(value, AUROC_MEASURE)} on the {which} model"
            for key, which in ((before, "last erased"), (final, "final"))
            if key is not None and (value := cell(group, key)) is not None
        ]
        text += f" {name}: AUROC {', '.join(found)}." if found else ""
    return text


def refusals(report: Report) -> list[tuple[int, list[str], list[str]]]:
    """Configurations of which something was refused or failed: a row of words for each, and what happened, by seed."""
    found = []
    for index, group in enumerate(report.groups):
        (refused, erasings), lost = erasings_refused(group), group_losses(group)
        said = [f"seed {' '.join(map(str, case.seeds))}, {note}" for case in group.cases for note in case.notes]
        if not (refused or lost.lost or lost.reasons or said):
            continue
        words = [
            f"{refused} of {erasings}" if erasings else DASH,
            f"{lost.lost} of {lost.asked}" if lost.asked else DASH,
        ]
        skipped = f"{lost.skipped} of {lost.rounds}" if lost.rounds else DASH
        found.append((index, [group.setting, group.defense, *words, reasons(lost) or DASH, skipped], said))
    return found


REFUSED_HEADINGS = ("setting", "defense", "erasings refused", "updates lost", "refused for", "rounds skipped")
REFUSED_NOTE = (
    "A server refuses an erased model that holds NaN or has lost too much accuracy on its own clean set "
    "(erasing.floor), and goes on with the one that it had. An update is lost if it was refused, never came, or was "
    "one of too few for its round. Counts are over all seeds; what came twice or too late is counted once more among "
    "the reasons, though not as lost."
)


def by_setting(report: Report) -> dict[tuple[str, str], list[int]]:
    """The configurations of each setting, in order."""
    found: dict[tuple[str, str], list[int]] = {}
    for index, group in enumerate(report.groups):
        found.setdefault((group.kind, group.setting), []).append(index)
    return found


def setting_sentence(report: Report, indexes: Sequence[int]) -> str:
    """What came of one setting as a whole: the undefended model, the lowest mean, how many defenses help."""
    own = [(index, report.groups[index]) for index in indexes]
    attacked = own[0][1].attacked
    measure = BY_KEY["acc" if not attacked else "asr_late" if any(cell(g, "asr_late") for _, g in own) else "asr"]
    known = [(found.mean, index, found) for index, group in own if (found := cell(group, measure.key)) is not None]
    if not known:
        return "Nothing is finished yet."
    plain = [found for _, index, found in known if report.groups[index].defense.startswith(NO_DEFENSE)]
    text = f"Without a defense {measure.name} is {number(plain[0], measure)}. " if plain else ""
    rest = [each for each in known if not report.groups[each[1]].defense.startswith(NO_DEFENSE)]
    if attacked and rest:
        _, index, best = min(rest)
        text += f"The lowest mean of {len(rest)} has {report.groups[index].defense}: {number(best, measure)}. "
    counted = [_counted(report, [index for _, index, _ in rest], key) for key in dict.fromkeys((measure.key, "acc"))]
    return f"{text}{' '.join(counted) if rest else ''}".strip()


def _counted(report: Report, indexes: Sequence[int], measure: str) -> str:
    """In how many of the tested defenses a measure is lower for sure than without one."""
    against = [report.against(index, measure).get(NO_DEFENSE) for index in indexes]
    tested = [each for each in against if each is not None and each.holm_p is not None]
    name = BY_KEY[measure].name
    if not tested:
        return f"Nothing is tested of {name}: there are too few common seeds."
    lower = sum(each.verdict != NO_EVIDENCE and each.paired.difference.mean < 0 for each in tested)
    return f"By the corrected test, {name} is lower than without a defense in {lower} of {len(tested)}."


def _against(report: Report, index: int, name: str, measure: str) -> str:
    """What the comparisons with one control say, in words; nothing if there are none."""
    found = [each for key in (measure, "acc") if (each := report.against(index, key).get(name)) is not None]
    if not found:
        return ""
    n = found[0].paired.difference.n
    if n < LEAST:
        return f" {_count(n, 'seed')} in common with {name}: too few for a verdict."
    tests = {"paired t" if each.paired.t_p is not None else "sign flips" for each in found}
    return f" Against {name} ({' and '.join(sorted(tests))}, n = {n}): {', '.join(map(_said, found))}."


def _said(found: Comparison) -> str:
    measure, difference = BY_KEY[found.measure].name, found.paired.difference
    p = p_value(found.holm_p)
    evidence = f"p {p}" if p.startswith("<") else f"p = {p}"
    if found.verdict not in ("better", "worse"):
        return f"no evidence of a difference in {measure} ({evidence})"
    way = "higher" if difference.mean > 0 else "lower"
    return f"{measure} {way} by {abs(difference.mean):.3f} ± {difference.half or 0:.3f} ({evidence})"


def overview(report: Report) -> str:
    """The report in one line."""
    cases = [case for group in report.groups for case in group.cases]
    groups, settings = len(report.groups), len({(group.kind, group.setting) for group in report.groups})
    n = {len(group.cases) for group in report.groups}
    many = f"{min(n)}" if len(n) == 1 else f"{min(n)} to {max(n)}"
    text = f"{_count(len(report.sources), 'run')}: {_count(groups, 'configuration')} in {_count(settings, 'setting')}"
    text += f", {many} seed{'s' if n != {1} else ''} each"
    unfinished = sum(not case.finished for case in cases)
    return text + (f"; {unfinished} not finished" if unfinished else "")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def left_out(report: Report) -> Sequence[str]:
    """What does not count, and why, a line each."""
    lines = [f"{each.folder}: {each.reason}" for each in report.unread]
    for group in report.groups:
        counted = group.by_seed()
        for case in group.repeats:
            if group.kind != FEDERATED and group.keys["eraser"] == NONE:  # a victim of several erasers
                continue
            other = counted[case.seeds]
            alike = not case.finished or all(
                case.measures.get(key) == other.measures.get(key) for key in ("acc", "asr")
            )
            said = (
                "the same configuration and seed as" if alike else "the configuration and seed, but not the numbers, of"
            )
            folder, counts = (report.sources[each.run].folder for each in (case, other))
            lines.append(f"{folder}: {said} {counts}, which counts ({group.label})")
    return list(dict.fromkeys(lines))
